"""Runs: a training run as a YAML recipe, its memory before it starts, and the accuracy after it."""
