"""Data sets with a name or form of their own, as image sources."""
