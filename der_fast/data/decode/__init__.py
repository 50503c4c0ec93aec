"""From a file, or what a caller holds, to RGB pixels."""
