"""A full disk stops a run with a message, and costs nothing that was saved."""

from __future__ import annotations

import contextlib
import errno
import gc
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from der_fast import files
from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.errors import StorageError
from der_fast.training.learner import Learner
from der_fast.training.progress import EpochRecord, Observer
from der_fast.training.run import learn_more, run_protocol

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]
Facts = Callable[[Path], dict[str, Any]]
SHORT = {"first.epochs": 1, "later.epochs": 1, "classifier.epochs": 1}


def run(out: Path, tiny: Tiny, synthetic: Images, **rest: Any) -> Learner:
    return run_protocol(tiny(SHORT), synthetic("abcdef"), synthetic("abcdef", 2, seed=1), out, **rest)


@pytest.fixture(scope="module")
def straight(tiny: Tiny, synthetic: Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    run(out, tiny, synthetic)
    return out


def full_disk(patch: pytest.MonkeyPatch, wanted: str) -> None:
    """Let the first half of every file whose path has `wanted` in it fit, and no more."""
    whole = files._store

    def store(path: Path, data: bytes) -> None:
        if wanted in str(path):
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        whole(path, data)

    patch.setattr(files, "_store", store)


POINTS = [
    ("checkpoints/.002-1-representation-0001.safetensors", 1),
    ("extractors/.02-", 1),
    ("steps/02/.model-", 1),
    ("steps/03/.memory-", 2),
    ("steps/03/.learner.json", 2),
]


@pytest.mark.parametrize(("wanted", "steps"), POINTS)
def test_what_was_saved_before_can_be_read_and_the_run_goes_on(
    wanted: str, steps: int, straight: Path, tiny: Tiny, synthetic: Images, run_facts: Facts, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        full_disk(patch, wanted)
        with pytest.raises(StorageError, match="No space left on device") as caught:
            run(out, tiny, synthetic)
    assert str(out / wanted.rpartition("/")[0]) in str(caught.value)
    assert not list(out.rglob("*.tmp"))
    assert Learner.load(out).class_names == tuple("abcdef"[: 2 * steps])
    run(out, tiny, synthetic, resume=True)
    assert run_facts(out) == run_facts(straight)


def test_no_space_for_learning_more(straight: Path, tiny: Tiny, synthetic: Images, tmp_path: Path) -> None:
    out = shutil.copytree(straight, tmp_path / "run")
    before = Learner.load(out).predict(synthetic("abcdef").images)
    with pytest.MonkeyPatch.context() as patch:
        full_disk(patch, "steps/04/")
        with pytest.raises(StorageError):
            learn_more(out, synthetic("gh"), None, tiny(SHORT))
    assert Learner.load(out).predict(synthetic("abcdef").images) == before
    assert learn_more(out, synthetic("gh"), None, tiny(SHORT)).class_names == tuple("abcdefgh")


def test_a_folder_that_cannot_be_written_to(straight: Path, tiny: Tiny, synthetic: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Learner.load(straight)

    def refuse(path: Path, *arguments: Any, **rest: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        learner.save(straight.with_name("other"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"there is no mount command: {error}")
    if mounted.returncode:
        pytest.skip(f"this user may not mount a file system: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        # A learner in a circle of references still maps its arenas, and a disk with a mapped file is busy.
        gc.collect()
        subprocess.run(["umount", folder], check=True)


class FillDisk(Observer):
    """Leaves no byte free once the first epoch of step 2 is over."""

    def __init__(self, ballast: Path) -> None:
        self.ballast = ballast

    def epoch_ends(self, record: EpochRecord) -> None:
        if record.step == 2:
            with contextlib.suppress(OSError), self.ballast.open("ab", buffering=0) as file:
                while True:
                    file.write(bytes(4096))


def test_a_disk_that_is_really_full(small_disk: Path, straight: Path, tiny: Tiny, synthetic: Images, run_facts: Facts) -> None:
    out, ballast = small_disk / "run", small_disk / "ballast"
    with pytest.raises(StorageError, match="No space left on device"):
        run(out, tiny, synthetic, observer=FillDisk(ballast))
    assert not list(out.rglob("*.tmp"))
    assert Learner.load(out).class_names == ("a", "b")
    with pytest.raises(StorageError, match="No space left on device"):
        run(out, tiny, synthetic, resume=True)
    ballast.unlink()
    run(out, tiny, synthetic, resume=True)
    assert run_facts(out) == run_facts(straight)
