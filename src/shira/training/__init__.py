"""Training: `attach` makes a few entries of a model trainable and returns a `Tuner`, the model in training."""
