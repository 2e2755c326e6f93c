"""An adapter as bytes on disk (docs/format.md); which files may be read or replaced."""
