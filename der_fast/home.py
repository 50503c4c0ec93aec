"""The user's home folder, and the cache folder in it. Users of containers may have neither."""

from __future__ import annotations

import os
import re
from pathlib import Path

from der_fast.errors import ConfigError

# A folder may be called ~old; only these certainly mean the home folder.
_HOME = re.compile(r"~(?:[/\\]|$)")


def expand(path: str | os.PathLike[str]) -> Path:
    """Return `path` with a leading ``~`` or ``~user`` replaced by the home folder; the only place that does so.

    A name that only looks like ``~user``, because there is no such user, is left unchanged.

    Raises:
        ConfigError: ``~`` of a user who has no home folder.
    """
    text = os.fspath(path)
    if not text.startswith("~"):
        return Path(text)
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        if _HOME.match(text):
            raise ConfigError(f"{text}: this user has no home folder; write the path without ~, or set HOME") from error
        return Path(text)


def cache_folder() -> Path | None:
    """Return where der_fast keeps what it can do without, by the system's conventions (on Linux ``$XDG_CACHE_HOME/der_fast``, else
    ``~/.cache/der_fast``); None if the user has no home. The folder may not exist or not be writable.
    """
    from platformdirs import user_cache_dir

    try:
        folder = Path(user_cache_dir("der_fast", appauthor=False))
    except RuntimeError:
        return None
    # Older versions of platformdirs leave an unresolved ~.
    return folder if folder.is_absolute() else None


def older_cache_folder() -> Path | None:
    """Return where version 0.1 kept archives on every system; None if the user has no home."""
    try:
        return Path.home() / ".cache" / "der_fast"
    except RuntimeError:
        return None
