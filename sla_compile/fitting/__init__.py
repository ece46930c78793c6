"""Fitting to data without training the model: gates, in closed form or by distillation, and the topk of each site."""
