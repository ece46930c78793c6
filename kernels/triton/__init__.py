"""Sparse-Linear Attention in portable Triton kernels."""
