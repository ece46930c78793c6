"""What every room may import: block arithmetic, token orders, limits and options; no graphs and no kernels."""
