"""Analysis: adapters compared, as numbers, pictures and a report."""
