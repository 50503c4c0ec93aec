"""Random crops, flips, jitter and normalisation: from stored pixels to the network's input."""
