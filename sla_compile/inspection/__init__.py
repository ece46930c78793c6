"""Look inside: what this machine runs, what a model loses, where its attention goes, and whether it really ran."""
