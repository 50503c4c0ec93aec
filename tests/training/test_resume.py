"""Runs that were killed with SIGKILL go on to the same numbers and weights, bit for bit."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.errors import DataError
from der_fast.training.learner import Learner
from der_fast.training.run import learn_more, run_protocol

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]
Facts = Callable[[Path], dict[str, Any]]

SCRIPT = Path(__file__).with_name("killed.py")
NAMES = runpy.run_path(str(SCRIPT))
SCENARIOS, LEARNING = [*NAMES["SCENARIOS"], *NAMES["WITHIN"]], [name for name in NAMES["LEARNING"] if "not killed" not in name]

# What is done to the newest checkpoint, and the epoch with which the run goes on.
DAMAGE = {
    "cut off": (2, "classifier", 1),
    "a flipped bit": (2, "classifier", 1),
    "a manifest cut off": (2, "classifier", 1),
    "both cut off": (2, "representation", 1),
}

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes with SIGKILL")


def run(out: Path, tiny: Tiny, synthetic: Images, **rest: Any) -> Learner:
    return run_protocol(tiny({"protocol.name": "B0-2"}), synthetic("abcd"), synthetic("abcd", 2, seed=1), out, **rest)


def more(out: Path, tiny: Tiny, synthetic: Images, **rest: Any) -> Learner:
    return learn_more(out, synthetic("ef"), synthetic("abcdef", 2, seed=1), tiny({"protocol.name": "B0-2"}), **rest)


@pytest.fixture(scope="module")
def straight(tiny: Tiny, synthetic: Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("straight") / "run"
    run(out, tiny, synthetic)
    return out


@pytest.fixture(scope="module")
def grown(straight: Path, tiny: Tiny, synthetic: Images) -> Path:
    """The same run after it learned two more classes."""
    out = shutil.copytree(straight, straight.with_name("grown"))
    more(out, tiny, synthetic)
    return out


@pytest.fixture(scope="module")
def killed(straight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what every killed process left."""
    folder = tmp_path_factory.mktemp("killed")
    for name in NAMES["LEARNING"]:
        shutil.copytree(straight, folder / name)
    ended = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    signals = json.loads(ended.stdout)
    for kind in DAMAGE:
        shutil.copytree(folder / "within the classifier stage", folder / kind)
    assert signals == {name: 0 if "not killed" in name else signal.SIGKILL for name in signals}, ended.stderr
    return folder


def left_over(out: Path) -> list[str]:
    return [path.name for path in (*out.rglob("*.tmp"), *out.glob("checkpoints/*"))]


# The first epoch that a resumed run trains, or None where everything was trained already.
GOES_ON_WITH = {
    "before the first checkpoint": (1, "representation", 1),
    "after the first checkpoint": (1, "representation", 2),
    "in a settled epoch of a later step": (2, "representation", 2),
    "between the two files of a checkpoint": (2, "representation", 2),
    "before the classifier stage": (2, "classifier", 1),
    "within the classifier stage": (2, "classifier", 2),
    "before the thread has written anything": (2, "classifier", 1),
    "while a step is measured": None,
    "in the middle of a file": (2, "representation", 1),
    "before a step's manifest": None,
    "before old states are deleted": None,
    "between a step and its metrics": None,
    "before the last checkpoints are deleted": None,
    "after a checkpoint within an epoch": (2, "representation", 2),
    "between the two files of a checkpoint within an epoch": (2, "representation", 2),
    "before the checkpoints within an epoch are deleted": (2, "representation", 1),
}


@pytest.mark.parametrize("point", SCENARIOS)
def test_a_killed_run_goes_on_to_the_same_end(
    point: str, killed: Path, straight: Path, tiny: Tiny, synthetic: Images, run_facts: Facts, watcher: Any
) -> None:
    learner = run(killed / point, tiny, synthetic, resume=True, observer=watcher)
    trained = [(record.step, record.stage, record.epoch) for record in watcher.records]
    assert next(iter(trained), None) == GOES_ON_WITH[point]
    assert run_facts(killed / point) == run_facts(straight)
    assert left_over(killed / point) == []
    images = synthetic("abcd").images
    assert learner.predict(images) == Learner.load(straight).predict(images)


@pytest.mark.parametrize(
    ("point", "first"),
    [
        ("with kept features, in an epoch that only gathers them", (2, "representation", 2)),
        ("with kept features, in the classifier stage", (2, "classifier", 2)),
    ],
)
def test_features_that_were_kept_are_computed_again_to_the_same_end(
    point: str, first: tuple[int, str, int], killed: Path, tiny: Tiny, synthetic: Images, run_facts: Facts, watcher: Any, tmp_path: Path
) -> None:
    config = tiny({"protocol.name": "B0-2", **NAMES["KEPT_VIEWS"]})
    arguments = (config, synthetic("abcd"), synthetic("abcd", 2, seed=1))
    run_protocol(*arguments, tmp_path / "straight")
    run_protocol(*arguments, killed / point, resume=True, observer=watcher)
    record = watcher.records[0]
    assert (record.step, record.stage, record.epoch) == first
    assert run_facts(killed / point) == run_facts(tmp_path / "straight")


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_costs_an_epoch_and_nothing_else(
    kind: str, killed: Path, straight: Path, tiny: Tiny, synthetic: Images, run_facts: Facts, watcher: Any
) -> None:
    out = killed / kind
    older, newest = sorted(out.glob("checkpoints/*.json"))
    wanted = {"a manifest cut off": [newest], "both cut off": [older.with_suffix(".safetensors"), newest]}
    for path in wanted.get(kind, [newest.with_suffix(".safetensors")]):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data if "flipped" in kind else data[:-30])
    run(out, tiny, synthetic, resume=True, observer=watcher)
    passed_over = [text for text in watcher.messages if "is skipped, going back to the one before" in text]
    assert len(passed_over) == (2 if kind == "both cut off" else 1)
    assert newest.stem in passed_over[0]
    first = watcher.records[0]
    assert (first.step, first.stage, first.epoch) == DAMAGE[kind]
    assert run_facts(out) == run_facts(straight)


@pytest.mark.parametrize("point", LEARNING)
def test_a_run_whose_learning_was_killed_is_what_it_was(
    point: str, killed: Path, straight: Path, grown: Path, tiny: Tiny, synthetic: Images, run_facts: Facts, tmp_path: Path
) -> None:
    out = killed / point
    finished = point == "learning more, before the metrics"
    before = Learner.load(grown if finished else straight)
    images = synthetic("abcdef").images
    assert Learner.load(out).predict(images) == before.predict(images)
    if finished:
        with pytest.raises(DataError, match="'e' is already known"):
            more(out, tiny, synthetic)
    else:
        more(out, tiny, synthetic)
        assert left_over(out) == []
    assert run_facts(out)["metrics"] == run_facts(grown)["metrics"]
    assert run_facts(out)["history"] == run_facts(grown)["history"]


def test_another_process_learns_the_same(killed: Path, grown: Path, run_facts: Facts) -> None:
    assert run_facts(killed / "learning more, not killed") == run_facts(grown)
