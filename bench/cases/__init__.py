"""The cases, one file per group; each has `cases(setting)`."""
