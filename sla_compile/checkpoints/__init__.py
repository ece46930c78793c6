"""Gates in files: our own format, and the weights that the authors' code learned."""
