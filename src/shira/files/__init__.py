"""Files: an adapter as bytes on disk (docs/format.md), and what may be read or replaced there."""
