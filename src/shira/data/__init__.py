"""Data: built-in models and tasks, fetched by version and sha256; examples, tokens and batches."""
