"""Random crops, flips and jitter, and the normalisation in front of the network."""
