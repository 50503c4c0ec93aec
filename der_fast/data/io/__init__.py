"""Reading bytes: threads that never keep a process alive, members of tars, downloads, progress."""
