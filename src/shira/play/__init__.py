"""A page in the browser: the base and the base with adapters side by side. What it does is apart from how it looks."""
