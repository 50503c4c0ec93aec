"""Lines of "path class" with spaces in both."""

from __future__ import annotations

import re

import pytest

from der_fast.data.catalogue import lines
from der_fast.data.catalogue.lines import parse_lines
from der_fast.errors import DataError


@pytest.fixture
def read(tmp_path):
    """Return a function that parses lines of a list in `tmp_path`: (path, class) of each."""
    return lambda *rows: [(line.path, line.class_name) for line in parse_lines(tmp_path / "list.txt", rows, 5.0)]


@pytest.mark.parametrize(
    ("line", "path", "name"),
    [
        ("cat/1.jpg cat", "cat/1.jpg", "cat"),
        ("cat/1.jpg   cat  ", "cat/1.jpg", "cat"),
        ("cat/1.jpg big dog", "cat/1.jpg", "big dog"),
        ("my photos/a 1.JPG big brown dog", "my photos/a 1.JPG", "big brown dog"),
        ("n01/img.JPEG tench, Tinca tinca", "n01/img.JPEG", "tench, Tinca tinca"),
        ("a.heic cold cut", "a.heic", "cold cut"),
        ("a,b.jpg dog", "a,b.jpg", "dog"),
        ("cat/1.jpg,cat", "cat/1.jpg", "cat"),
        ("my photos/1.jpg, big dog", "my photos/1.jpg", "big dog"),
        ("my photos/no suffix\tbig dog", "my photos/no suffix", "big dog"),
        ("a.jpg b.jpg\tx.png y", "a.jpg b.jpg", "x.png y"),
        ('"my photos/a, b.jpg","big dog"', "my photos/a, b.jpg", "big dog"),
        ('"my photos/a b" big dog', "my photos/a b", "big dog"),
        ('my photos/a b "big dog"', "my photos/a b", "big dog"),
        ('"say ""cheese"".jpg" dog', 'say "cheese".jpg', "dog"),
        ("plain 7", "plain", "7"),
        ("1.jpg caf\u0065\u0301", "1.jpg", "caf\u00e9"),
    ],
)
def test_a_line_is_read_as_it_is_meant(read, line, path, name):
    assert read(line) == [(path, name)]


def test_where_the_suffix_does_not_tell_the_files_do(read, tmp_path):
    (tmp_path / "two words").write_bytes(b"x")
    (tmp_path / "a.jpg b.jpg").write_bytes(b"x")
    assert read("two words big dog", "", "a.jpg b.jpg cat") == [("two words", "big dog"), ("a.jpg b.jpg", "cat")]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["a.jpg cat", "two words dog"], "line 2: 'two words dog' does not show where the path ends.*none of 'two', 'two words' is a file"),
        (["x y z"], "line 1: .*'x' and 'x y' are files\\); put a tab between the two"),
        (["a.jpg cat", "alone.jpg"], "line 2: 'alone.jpg' is not 'path class'"),
        (["a.jpg\tcat\tdog"], "line 1: .* is not 'path class'"),
        (["a.jpg cat", "b.jpg cat", "./a.jpg dog"], "lines 1 and 3: './a.jpg' is listed as 'cat' and as 'dog'"),
    ],
)
def test_what_is_not_clear_is_refused_with_its_number(read, tmp_path, rows, words):
    for name in ("x", "x y"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=f"{re.escape(str(tmp_path / 'list.txt'))}, {words}"):
        read(*rows)


def test_a_heading_and_equal_lines_count_for_nothing(read):
    assert read("filename,label", "a.jpg,cat", "a.jpg cat") == [("a.jpg", "cat")]


def test_a_drive_that_does_not_answer_ends_the_question(tmp_path, dead):
    dead(lines, "_are_files")
    with pytest.raises(DataError, match=r"reading .*two.* took longer than data\.timeout=0\.2 seconds"):
        parse_lines(tmp_path / "list.txt", ["two words dog"], 0.2)
