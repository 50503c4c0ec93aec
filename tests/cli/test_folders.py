"""Where a new run goes: a folder of its own, whoever else starts one at the same moment."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import typer
from typer.core import TyperCommand

from der_fast.cli.folders import new_folder
from der_fast.errors import StorageError


def context() -> typer.Context:
    return typer.Context(TyperCommand("train"))


def test_whoever_comes_at_once_gets_a_folder_of_their_own(tmp_path: Path) -> None:
    """Three trainings started together chose the same name, and two of them failed."""
    begin = threading.Barrier(8)

    def choose(_: int) -> list[Path]:
        begin.wait(20)
        return [new_folder(context(), tmp_path / "runs", "Digits B0-5") for _ in range(20)]

    with ThreadPoolExecutor(8) as pool:
        found = [folder for folders in pool.map(choose, range(8)) for folder in folders]
    names = ["digits-b0-5", *(f"digits-b0-5-{number}" for number in range(2, 161))]
    assert sorted(found) == sorted(tmp_path / "runs" / name for name in names) and all(folder.is_dir() for folder in found)


def test_what_was_never_written_to_is_taken_away(tmp_path: Path) -> None:
    with context() as ctx:
        empty, used = new_folder(ctx, tmp_path, "run"), new_folder(ctx, tmp_path, "run")
        (used / "config.json").write_bytes(b"{}")
    assert not empty.exists() and (used / "config.json").exists()


def test_links_and_files_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    (tmp_path / "run-2").write_bytes(b"")
    assert new_folder(context(), tmp_path, "run") == tmp_path / "run-3"
    for parent in ("run", "run-2"):
        with pytest.raises(StorageError, match=f"cannot make .*{parent}/run.*; give another --out"):
            new_folder(context(), tmp_path / parent, "run")


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests often run as a user who may write everywhere, so the system's answer is put in its mouth."""

    def refuse(path: Path, *arguments: object, **keywords: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError, match="cannot make .*: Permission denied; give another --out"):
        new_folder(context(), tmp_path, "run")
