"""One spelling for a name, however its bytes encode it."""

from __future__ import annotations

import unicodedata


def spelled(name: str) -> str:
    """Return a name as it is compared: composed (Unicode NFC), so that "é" is one letter whichever system wrote it."""
    return unicodedata.normalize("NFC", name)
