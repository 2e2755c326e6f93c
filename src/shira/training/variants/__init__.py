"""Variants of training: DoRA, a low-rank product beside the entries, deltas beside a quantized weight."""
