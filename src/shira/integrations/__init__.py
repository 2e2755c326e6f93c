"""Integrations: one file for each library that shira works with."""
