"""Every error that der_fast raises on purpose.

A message says what was wrong, where (path, key, shape) and what to do about it. What to do has different names in Python and on the
command line, so a message may combine texts with things that have two names:

    raise ConfigError(f"{out} already holds a run; continue it with ", Spelling("--resume", "resume=True"))
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spelling:
    """Something that a person gives, with both of its names.

    Args:
        option: as it is typed on the command line, e.g. ``"--resume"``.
        argument: as it is written in Python, e.g. ``"resume=True"``.
    """

    option: str
    argument: str


# Named in many messages.
OUT = Spelling("--out", "out")
RESUME = Spelling("--resume", "resume=True")


class DerFastError(Exception):
    """Base class of every error raised on purpose by this package.

    Args:
        parts: the message: texts, and things with two names. `str` gives the names of Python.
    """

    def __init__(self, *parts: str | Spelling) -> None:
        super().__init__(*parts)

    def __str__(self) -> str:
        return "".join(part.argument if isinstance(part, Spelling) else str(part) for part in self.args)

    def on_command_line(self) -> str:
        """Return the message as the command line shows it."""
        return "".join(part.option if isinstance(part, Spelling) else str(part) for part in self.args)


class UserError(DerFastError):
    """Something the caller can fix: the command line ends with exit code 2."""


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
