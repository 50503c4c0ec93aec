"""The configuration tree, its presets and its checks."""
