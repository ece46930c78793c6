"""The study that the examples and benchmarks share: a video model, its data, and the arms that are compared on it."""
