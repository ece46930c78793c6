"""What is fitted to data without training the model: gates, in closed form or by distillation, and a topk per site."""
