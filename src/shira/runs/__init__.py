"""Training runs: the run as a YAML recipe, an estimate of its memory, and the accuracy after it."""
