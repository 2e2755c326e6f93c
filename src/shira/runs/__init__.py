"""Runs: recipes of training and the estimate of its memory, live models to measure or chat with, and where a run writes."""
