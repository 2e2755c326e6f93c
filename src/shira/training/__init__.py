"""Training: `attach` makes a few entries of a model trainable, a `Tuner` is the model in training."""
