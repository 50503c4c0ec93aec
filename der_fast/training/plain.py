"""Lines of text that any stream accepts: no control characters, nothing outside its encoding, written at once."""

from __future__ import annotations

from typing import TextIO

# The characters beyond ASCII that the program itself writes, as one would type them.
_TYPED = {"–": "-", "—": "-", "…": "...", "×": "x", "→": "->", "≥": ">=", "≤": "<=", "λ": "lambda", "’": "'"}


def write_line(stream: TextIO, text: str) -> None:
    """Write one line and flush; raises OSError, or ValueError if the stream is closed."""
    stream.write(encodable(printable(text), getattr(stream, "encoding", None) or "utf-8") + "\n")
    stream.flush()


def printable(text: str) -> str:
    """Write control characters as escapes (a class may be a folder of any name)."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def encodable(text: str, encoding: str) -> str:
    """Write characters that `encoding` lacks as one would type them, or else as escapes."""
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
