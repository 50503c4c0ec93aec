"""The command line `der-fast`: a thin face over `der_fast.api`."""
