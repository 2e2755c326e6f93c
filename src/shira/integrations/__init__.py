"""Integrations: each file is for one library that shira works with. A large library has several files."""
