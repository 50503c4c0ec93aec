"""Lines of text that any stream takes: no control characters, nothing that its encoding does not have, written at once."""

from __future__ import annotations

from typing import TextIO

# What the program itself writes beyond ASCII, as one would type it.
_TYPED = {"–": "-", "—": "-", "…": "...", "×": "x", "→": "->", "≥": ">=", "≤": "<=", "λ": "lambda", "’": "'"}


def write_line(stream: TextIO, text: str) -> None:
    """Write one line and flush; raises OSError, or ValueError where the stream is closed."""
    stream.write(encodable(printable(text), getattr(stream, "encoding", None) or "utf-8") + "\n")
    stream.flush()


def printable(text: str) -> str:
    """Write control characters (a class may be a folder of any name) as escapes."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def encodable(text: str, encoding: str) -> str:
    """Write what `encoding` does not have as one would type it, or else as an escape."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(_letter(letter, encoding) for letter in text)
    except LookupError:
        return encodable(text, "ascii")
    return text


def _letter(letter: str, encoding: str) -> str:
    try:
        letter.encode(encoding)
    except UnicodeEncodeError:
        return _TYPED.get(letter) or ascii(letter)[1:-1]
    return letter
