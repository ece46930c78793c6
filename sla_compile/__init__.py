"""sla-compile: ``torch.compile(model, backend="sla")`` turns a DiT's self-attention into Sparse-Linear Attention."""

__version__ = "0.1.0"
