"""From a file, or an object of the caller's, to RGB pixels."""
