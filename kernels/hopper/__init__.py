"""The hot kernels in Gluon, for Hopper GPUs."""
