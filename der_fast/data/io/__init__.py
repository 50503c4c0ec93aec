"""Reading bytes: threads that never hang, members of tars, downloads, progress."""
