"""Renaming and forgetting classes of a saved run: what the folder holds afterwards, also where the process was killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.data.catalogue.index import FILE as INDEX
from der_fast.errors import CheckpointError, DataError, StorageError
from der_fast.training.edit import forget_in_run, rename_in_run
from der_fast.training.learner import Learner
from der_fast.training.progress import EpochRecord, Observer
from der_fast.training.run import learn_more, run_protocol
from der_fast.training.storage.saved import saved_steps

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]
SHORT = {"first.epochs": 1, "later.epochs": 2, "classifier.epochs": 1}
SCRIPT = Path(__file__).with_name("killed_edit.py")


@pytest.fixture(scope="module")
def finished(tiny: Tiny, synthetic: Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps of two classes; the last two states are kept, and both know the first two steps' classes."""
    out = tmp_path_factory.mktemp("run") / "run"
    run_protocol(tiny(SHORT), synthetic("abcdef"), synthetic("abcdef", 2, seed=1), out)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def resumed(out: Path, tiny: Tiny, synthetic: Images, **rest: Any) -> Learner:
    return run_protocol(tiny(SHORT), synthetic("abcdef"), synthetic("abcdef", 2, seed=1), out, resume=True, **rest)


def exemplars(finished: Path, name: str) -> list[bytes]:
    """The pixels of a class's exemplars, as they lie in a file, in every state that the run keeps."""
    found = []
    for state in saved_steps(finished):
        copy = finished.with_name(f"state-{state}")
        shutil.copytree(finished, copy)
        for other in saved_steps(copy):
            if other > state:
                (copy / "steps" / f"{other:02d}" / "learner.json").unlink()
        memory = Learner.load(copy).model.memory
        shutil.rmtree(copy)
        if name in memory.class_names:
            found += [image.numpy().tobytes() for image in memory.images[memory.labels == memory.class_names.index(name)]]
    assert found
    return found


def holding(run: Path, pixels: list[bytes]) -> list[str]:
    """The files in which one of the images is found."""
    return [str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and any(one in path.read_bytes() for one in pixels)]


def test_renaming_keeps_both_states_and_every_weight(run: Path, finished: Path, synthetic: Images) -> None:
    tensors = {path.relative_to(run): path.stat().st_ino for path in run.rglob("*.safetensors")}
    rename_in_run(run, "b", "bee")
    assert {path.relative_to(run): path.stat().st_ino for path in run.rglob("*.safetensors")} == tensors
    assert json.loads((run / "metrics.json").read_text())["class_names"] == ["a", "bee", "c", "d", "e", "f"]
    assert Learner.load(run).class_names == ("a", "bee", "c", "d", "e", "f")
    assert Learner.load(run).model.memory.class_names == ("a", "bee", "c", "d", "e", "f")
    # A damaged state costs one step, and not the name.
    next(run.glob("steps/03/model-*")).unlink()
    before = Learner.load(run)
    assert (before.class_names, before.model.memory.class_names) == (("a", "bee", "c", "d"), ("a", "bee", "c", "d"))
    assert before.results[0].class_names == ("a", "bee")


def test_forgetting_leaves_no_exemplar_in_any_file(run: Path, finished: Path) -> None:
    pixels = exemplars(finished, "b")
    assert {name.split("/")[1] for name in holding(run, pixels)} == {"02", "03"}
    (run / INDEX).write_bytes(b"names of files")
    (run / "steps" / "03" / ".memory-1.safetensors.123-0123abcd.tmp").write_bytes(pixels[0])
    learner = forget_in_run(run, ["b"])
    assert holding(run, pixels) == []
    assert not (run / INDEX).exists() and not list(run.rglob("*.tmp"))
    assert saved_steps(run) == [3]
    assert Learner.load(run).class_names == learner.class_names == tuple("acdef")


def test_a_state_that_never_knew_the_class_is_kept(run: Path) -> None:
    forget_in_run(run, ["f"])
    assert saved_steps(run) == [2, 3]


def test_a_finished_run_is_resumed_after_both(run: Path, tiny: Tiny, synthetic: Images) -> None:
    rename_in_run(run, "a", "ant")
    forget_in_run(run, ["c", "d"])
    before = (run / "metrics.json").read_text()
    assert resumed(run, tiny, synthetic).class_names == ("ant", "b", "e", "f")
    assert json.loads((run / "metrics.json").read_text())["steps"] == json.loads(before)["steps"] == [["ant", "b"], [], ["e", "f"]]


class Stop(Observer):
    def epoch_ends(self, record: EpochRecord) -> None:
        if (record.step, record.stage, record.epoch) == (3, "representation", 2):
            raise KeyboardInterrupt


@pytest.fixture
def stopped(tiny: Tiny, synthetic: Images, tmp_path: Path) -> Path:
    """A run that was stopped in its third step, after a checkpoint."""
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run_protocol(tiny(SHORT), synthetic("abcdef"), synthetic("abcdef", 2, seed=1), out, observer=Stop())
    assert list(out.glob("checkpoints/003-1-*.json"))
    return out


def test_a_stopped_run_goes_on_from_its_checkpoint_after_renaming(
    stopped: Path, finished: Path, tiny: Tiny, synthetic: Images, watcher: Any
) -> None:
    rename_in_run(stopped, "a", "ant")
    learner = resumed(stopped, tiny, synthetic, observer=watcher)
    assert next((record.step, record.stage, record.epoch) for record in watcher.records) == (3, "representation", 2)
    assert learner.class_names == ("ant", "b", "c", "d", "e", "f")
    ours, theirs = (json.loads((out / "metrics.json").read_text()) for out in (stopped, finished))
    assert (ours["top1"], ours["confusion"]) == (theirs["top1"], theirs["confusion"])


def test_a_stopped_run_goes_on_after_forgetting(stopped: Path, tiny: Tiny, synthetic: Images, watcher: Any) -> None:
    forget_in_run(stopped, ["a"])
    assert not list(stopped.glob("checkpoints/*"))
    learner = resumed(stopped, tiny, synthetic, observer=watcher)
    assert learner.model.class_sets == [("b",), ("c", "d"), ("e", "f")]
    assert watcher.steps[0][0] == 3
    assert sum(map(sum, learner.metrics()["confusion"])) == 10


def test_a_name_that_a_later_step_brings(stopped: Path, tiny: Tiny, synthetic: Images) -> None:
    rename_in_run(stopped, "a", "e")
    with pytest.raises(CheckpointError, match="'a' is 'e' now, and the data set has a class of that name.*der_fast.rename_class"):
        resumed(stopped, tiny, synthetic)
    rename_in_run(stopped, "e", "ant")
    assert resumed(stopped, tiny, synthetic).class_names == ("ant", "b", "c", "d", "e", "f")


def test_more_is_learned_and_forgotten_classes_again(run: Path, tiny: Tiny, synthetic: Images) -> None:
    forget_in_run(run, ["a", "b"])
    learner = learn_more(run, synthetic("bg"), synthetic("bcdefg", 2, seed=1), tiny(SHORT))
    assert learner.model.class_sets == [(), ("c", "d"), ("e", "f"), ("b", "g")]
    assert Learner.load(run).class_names == tuple("cdefbg")
    assert learner.metrics()["bwt"] is not None


def test_what_is_refused_leaves_the_run_alone(run: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for call in (lambda: rename_in_run(run, "x", "y"), lambda: rename_in_run(run, "a", "b"), lambda: forget_in_run(run, ["a", "x"])):
        with pytest.raises(DataError):
            call()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    for wrong in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match="holds no saved learner"):
            forget_in_run(wrong, ["a"])
    assert not (tmp_path / "none").exists()


def test_a_damaged_newest_state_is_not_thrown_away(run: Path) -> None:
    model = next(run.glob("steps/03/model-*"))
    data = model.read_bytes()
    model.write_bytes(data[:-1])
    for call in (lambda: rename_in_run(run, "a", "x"), lambda: forget_in_run(run, ["a"])):
        with pytest.raises(CheckpointError, match=r"steps/03\) is damaged, and would be lost; restore it"):
            call()
    model.write_bytes(data)
    assert Learner.load(run).class_names == tuple("abcdef")


@pytest.mark.skipif(os.name != "posix", reason="holds a folder by flock")
def test_a_run_that_another_process_writes_to(run: Path) -> None:
    hold = "import sys; from der_fast.files import held\nwith held(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", hold, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match="another process is writing"):
            forget_in_run(run, ["a"])
    finally:
        other.communicate("")
    assert forget_in_run(run, ["a"]).class_names == tuple("bcdef")


@pytest.mark.skipif(os.name != "posix", reason="kills processes with SIGKILL")
def test_a_process_killed_at_any_point_leaves_the_old_or_the_new(finished: Path, tmp_path: Path, synthetic: Images) -> None:
    ended = subprocess.run([sys.executable, SCRIPT, finished, tmp_path], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    counts = json.loads(ended.stdout)
    pixels, images = exemplars(finished, "b"), synthetic("abcdef").images
    edits: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
        "rename": (lambda run: rename_in_run(run, "b", "bee"), ("a", "bee", "c", "d", "e", "f")),
        "forget": (lambda run: forget_in_run(run, ["b"]), ("a", "c", "d", "e", "f")),
    }
    for what, (edit, new) in edits.items():
        assert counts[what] > 10
        wanted = Learner.load(tmp_path / f"{what}-{counts[what]}").predict(images)
        seen = set()
        for point in range(counts[what]):
            run = tmp_path / f"{what}-{point}"
            names = Learner.load(run).class_names
            assert names in (tuple("abcdef"), new)
            seen.add(names)
            if names == new:
                with pytest.raises(DataError, match="there is no class 'b'" if what == "rename" else "has already been forgotten"):
                    edit(run)
            else:
                edit(run)
            assert Learner.load(run).predict(images) == wanted
            assert json.loads((run / "metrics.json").read_text())["class_names"] == list(new)
            assert not list(run.rglob("*.tmp"))
            if what == "forget":
                assert holding(run, pixels) == []
            shutil.rmtree(run)
        assert len(seen) == 2
