"""Fusion: several adapters combined into one."""
