from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from der_fast import files
from der_fast.errors import StorageError
from der_fast.files import LOCK, held, remove_leftovers, sha256_of, write_atomically, write_bytes, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_in_folders_that_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    assert write_bytes(str(path), b"one") == path
    assert write_bytes(path, b"two") == path
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["file"]


def test_the_old_version_stands_while_the_new_one_is_written(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "file", b"old")

    def write(temporary: Path) -> None:
        assert temporary.parent == path.parent
        temporary.write_bytes(b"half")
        assert path.read_bytes() == b"old"
        temporary.write_bytes(b"new")

    write_atomically(path, write)
    assert path.read_bytes() == b"new"


def fail_with(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: Any, **rest: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("place", ["write", "fsync", "rename"])
def test_where_the_system_fails_the_old_version_stays(place: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_bytes(tmp_path / "file", b"old")
    error = OSError(number, os.strerror(number))
    owner, name = {"write": (Path, "write_bytes"), "fsync": (os, "fsync"), "rename": (Path, "replace")}[place]
    monkeypatch.setattr(owner, name, fail_with(error))
    with pytest.raises(StorageError) as caught:
        write_bytes(path, b"new")
    assert f"could not write {path}: {os.strerror(number)}" in str(caught.value)
    assert "unharmed" in str(caught.value)
    for how, text in (("--resume", caught.value.on_command_line()), ("resume=True", str(caught.value))):
        assert (f"free some space, then continue with {how}" in text) == (number in (errno.ENOSPC, errno.EDQUOT))
        assert (f"make the folder writable, then continue with {how}" in text) == (number == errno.EROFS)
    assert caught.value.__cause__ is error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a fault of the writer"), MemoryError()])
def test_other_errors_are_passed_on_and_leave_nothing_behind(error: BaseException, tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "file", b"old")

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise error

    with pytest.raises(type(error)) as caught:
        write_atomically(path, write)
    assert caught.value is error
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["file"])


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for path in (tmp_path / "file" / "below", tmp_path / "file" / "far" / "below"):
        with pytest.raises(StorageError, match=str(path)) as caught:
            write_bytes(path, b"new")
        assert isinstance(caught.value.__cause__, OSError)
        assert str(caught.value).endswith("choose another path.")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_folder_in_the_way_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file" / "below").mkdir(parents=True)
    with pytest.raises(StorageError, match="could not write"):
        write_bytes(tmp_path / "file", b"new")
    assert names(tmp_path) == ["file"]


def test_json_is_plain_and_has_no_nan(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", {"x": [1, None, "ü"], "y": 0.1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"x": [1, None, "ü"], "y": 0.1}
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            write_json(path, {"x": value})
    assert json.loads(path.read_text())["y"] == 0.1


def test_checksum(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000
    assert sha256_of(write_bytes(tmp_path / "large", data)) == hashlib.sha256(data).hexdigest()
    assert sha256_of(str(write_bytes(tmp_path / "empty", b""))) == hashlib.sha256(b"").hexdigest()


def test_writers_that_race_leave_one_whole_version(tmp_path: Path) -> None:
    path, versions = tmp_path / "file", [bytes([number]) * 200_000 for number in range(6)]
    start = threading.Barrier(6)

    def write(data: bytes) -> None:
        start.wait()
        for _ in range(5):
            write_bytes(path, data)

    threads = [threading.Thread(target=write, args=(data,)) for data in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in versions
    assert names(tmp_path) == ["file"]


def test_only_our_leftovers_are_removed(tmp_path: Path) -> None:
    ours = [".metrics.json.123-0123abcd.tmp", ".01-ab.safetensors.1-ffffffff.tmp"]
    others = ["metrics.json", ".hidden.tmp", "a.tmp", ".a.12.tmp", ".a.12-0123abcd.tmp.bak", "a.12-0123abcd.tmp"]
    for name in (*ours, *others):
        (tmp_path / name).write_bytes(b"")
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "missing")
    assert names(tmp_path) == sorted(others)


def test_a_writer_that_was_killed_leaves_what_is_removed(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"old")
    code = """
import os, signal, sys
from pathlib import Path
from der_fast.files import write_atomically

def write(temporary):
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGTERM)

write_atomically(Path(sys.argv[1]), write)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], check=False)
    assert len(names(tmp_path)) == 2
    remove_leftovers(tmp_path)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def in_a_thread(call: Callable[[], Any]) -> BaseException | None:
    """Run `call` in another thread and return what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def hold(folder: Path) -> None:
    with held(folder):
        pass


def test_a_folder_is_held_by_one_thread_which_may_hold_it_again(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with held(folder):
        with held(str(folder)):
            pass
        error = in_a_thread(lambda: hold(folder))
        assert isinstance(error, StorageError)
        assert str(folder) in str(error)
        assert in_a_thread(lambda: hold(tmp_path / "other")) is None
    assert in_a_thread(lambda: hold(folder)) is None
    assert names(folder) == [LOCK]


def test_a_folder_is_let_go_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), held(tmp_path):
        raise KeyError
    assert in_a_thread(lambda: hold(tmp_path)) is None


@pytest.mark.skipif(os.name != "posix", reason="needs the locks of a POSIX system")
def test_a_folder_is_held_by_one_process_until_it_ends(tmp_path: Path) -> None:
    code = """
import sys
from der_fast.files import held

with held(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match=f"another process is writing to {tmp_path}"):
            hold(tmp_path)
        other.kill()
        other.wait()
        hold(tmp_path)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot write to"):
        hold(tmp_path / "file")
    assert in_a_thread(lambda: hold(tmp_path / "other")) is None


@pytest.mark.skipif(os.name != "posix", reason="needs the locks of a POSIX system")
def test_a_drive_without_locks_is_written_to_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr(fcntl, "flock", fail_with(OSError(errno.ENOLCK, "No locks available")))
    with held(tmp_path):
        write_bytes(tmp_path / "file", b"new")
        assert isinstance(in_a_thread(lambda: hold(tmp_path)), StorageError)
    assert files._held == {}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks processes")
def test_a_forked_process_does_not_hold_what_its_parent_holds(tmp_path: Path) -> None:
    code = """
import os, sys
from der_fast.errors import StorageError
from der_fast.files import held

with held(sys.argv[1]):
    child = os.fork()
    if not child:
        try:
            with held(sys.argv[1]):
                os._exit(1)
        except StorageError as error:
            os._exit(0 if "another process" in str(error) else 2)
    assert os.waitpid(child, 0)[1] == 0
    with held(sys.argv[1]):
        pass
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=100, check=True)
