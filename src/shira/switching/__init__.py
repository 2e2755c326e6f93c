"""Switching: adapters are written into a live model, and taken out again."""
