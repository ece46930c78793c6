"""Sparse-Linear Attention in vectorised PyTorch, for the CPU."""
