"""The data sets that have a name or a form of their own, as image sources."""
