"""Tensors in, tensors out: the definition, and kernels in PyTorch (CPU), Triton and Gluon (GPU). Knows no FX."""
