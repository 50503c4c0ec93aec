"""Backbones, channel masks, the frozen bank and the classifiers."""
