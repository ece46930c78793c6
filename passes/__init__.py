"""Graph in, graph out: match attention, cost it, decide, rewrite. Knows FX, no kernels."""
