"""Checkpoints: adapters extracted from a fine-tuned model, and merged into a plain checkpoint."""
