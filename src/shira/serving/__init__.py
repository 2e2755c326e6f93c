"""Serving: one model, many adapters, each request with its own; on vLLM or on Transformers."""
