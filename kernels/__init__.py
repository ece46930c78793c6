"""Tensors in, tensors out: the definition, the CPU path and the Triton kernels. Knows no FX."""
