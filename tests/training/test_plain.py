from __future__ import annotations

import io

import pytest

from der_fast.training.plain import encodable, printable, write_line


class Flushed(io.TextIOWrapper):
    """Counts how often it was flushed by its user."""

    flushes = 0

    def flush(self) -> None:
        self.flushes += 1
        super().flush()


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("ascii", "8x8 -> left -:--... \\xe4 \\u732b"),
        ("latin-1", "8×8 -> left -:--... ä \\u732b"),
        ("cp1252", "8×8 -> left –:––… ä \\u732b"),
        ("utf-8", "8×8 → left –:––… ä 猫"),
    ],
)
def test_every_encoding_takes_every_line(encoding: str, text: str) -> None:
    raw = io.BytesIO()
    stream = Flushed(raw, encoding=encoding, errors="strict", newline="\n")
    write_line(stream, "8×8 → left –:––… ä 猫")
    assert stream.flushes == 1
    assert raw.getvalue().decode(encoding) == f"{text}\n"


def test_names_cannot_move_the_cursor() -> None:
    stream = io.StringIO()
    write_line(stream, "cat\rdog \x1b[31mred\nowl \x07 \u202e half \ud800 pair\t.")
    assert stream.getvalue() == "cat\\rdog \\x1b[31mred\\nowl \\x07 \\u202e half \\ud800 pair\\t.\n"
    assert printable("größer × 猫") == "größer × 猫"


def test_an_encoding_that_nobody_knows() -> None:
    assert encodable("8×8 ä", "x-none") == "8x8 \\xe4"
