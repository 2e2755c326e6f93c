"""Sparse tensors: a few positions of a tensor and their values; rules that draw positions; the k largest entries."""
