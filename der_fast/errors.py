"""Every error that der_fast raises on purpose.

A message says what was wrong, where (path, key, shape) and what to do about it.
"""

from __future__ import annotations


class DerFastError(Exception):
    """Base class of every error raised on purpose by this package."""


class UserError(DerFastError):
    """Something the caller can mend: the command line ends with exit code 2."""


class ConfigError(UserError):
    """A configuration key or value that cannot be used."""


class DataError(UserError):
    """Images, labels or folders that cannot be used."""


class CheckpointError(UserError):
    """A saved run that is missing, damaged, or belongs to another configuration."""


class StorageError(UserError):
    """A file could not be written: no space left, no permission."""


class ExportError(UserError):
    """A model that cannot be exported as asked, or an exported file that cannot be used."""


class DivergenceError(UserError):
    """The loss is no longer a finite number."""


class BackendError(UserError):
    """The requested backend or device does not work here."""
