"""Tiny images and settings, with which a whole step takes a fraction of a second. `killed.py` uses them in another process."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from der_fast.config.schema import Config
from der_fast.config.tree import replace_keys
from der_fast.data import MemorySource, transforms_for
from der_fast.training import latency
from der_fast.training.context import Context
from der_fast.training.learner import Learner
from der_fast.training.progress import EpochRecord, Observer

# The same examples every time, and no example fails because the machine is busy.
hypothesis.settings.register_profile("repeatable", max_examples=50, deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

# Every key that decides about a number is written out, so that a new default changes no test.
KEYS: dict[str, Any] = {
    "data.crop_padding": 1,
    "data.flip": True,
    "data.brightness": 0.1,
    "protocol.name": "B0-3",
    "protocol.class_order_seed": None,
    "model.backbone": "resnet20",
    "model.width": 2,
    "model.stem": "small",
    "masks.enabled": True,
    "masks.s_max": 20.0,
    "masks.lr": 0.5,
    "masks.init_low": -0.5,
    "masks.init_high": 2.0,
    "masks.clamp": 6.0,
    "masks.sparsity": 1.0,
    "masks.target_params": None,
    "masks.settle": 0.5,
    "masks.floor": 0.5,
    "masks.bn_images": 8,
    # A checkpoint after every epoch.
    "runtime.checkpoint_seconds": 0.0,
    **{
        f"{stage}.{name}": value
        for stage in ("first", "later", "classifier")
        for name, value in {
            "epochs": 2, "lr": 0.05, "milestones": (1,), "gamma": 0.1, "warmup_epochs": 0, "warmup_lr": 0.01,
            "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 8,
        }.items()
    },
    "classifier.temperature": 5.0,
    "memory.total": 12,
    "memory.per_class": None,
    "method.name": "der",
    "method.aux_weight": 1.0,
    "method.fwt": False,
    "runtime.seed": 7,
    "runtime.device": "cpu",
    "runtime.threads": 1,
    "runtime.eval_batch_size": 16,
    "runtime.keep_checkpoints": 2,
}  # fmt: skip


def tiny_config(changes: Mapping[str, Any] | None = None) -> Config:
    """Three steps of a ResNet-20 of width 2; `changes` are dotted keys."""
    return replace_keys(Config(), {**KEYS, **(changes or {})})


def synthetic_images(names: Sequence[str], per_class: int = 5, side: int = 8, seed: int = 0) -> MemorySource:
    """A pattern per class name, plus noise."""
    rows, labels = [], []
    noise = torch.Generator().manual_seed(seed)
    for label, name in enumerate(names):
        base = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
        pattern = torch.randint(0, 256, (1, side, side, 3), generator=base)
        rows.append((pattern + torch.randint(-20, 21, (per_class, side, side, 3), generator=noise)).clamp(0, 255).to(torch.uint8))
        labels += [label] * per_class
    return MemorySource(torch.cat(rows), torch.tensor(labels), names)


def tiny_context(config: Config, source: MemorySource, observer: Observer | None = None, **rest: Any) -> Context:
    """What the stages of a step get from a learner."""
    train, test = transforms_for(config.data, source.image_size)
    return Context(config, torch.device("cpu"), train, test, observer or Observer(), **rest)


def facts_of(run: Path) -> dict[str, Any]:
    """Everything that a run left and that must not depend on when it was interrupted: weights, memory, masks, metrics, history."""
    metrics = json.loads((run / "metrics.json").read_text())
    history = json.loads((run / "history.json").read_text())["epochs"]
    timed = ("seconds", "saved_seconds", "training_seconds", "data_seconds", "notes")
    timed += tuple(name for name in metrics if name.startswith("latency"))
    return {
        "files": {
            path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(run.rglob("*.safetensors"))
        },
        "metrics": {name: value for name, value in metrics.items() if name not in timed},
        "history": [
            {name: value for name, value in row.items() if name not in ("images_per_s", "seconds", "data_seconds", "processor_seconds")}
            for row in history
        ],
    }


class Watcher(Observer):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.records: list[EpochRecord] = []
        self.steps: list[tuple[int, tuple[str, ...], int]] = []
        self.summaries: list[dict[str, Any]] = []

    def step_begins(self, step: int, steps: int, class_names: Sequence[str], images: int) -> None:
        self.steps.append((step, tuple(class_names), images))

    def epoch_ends(self, record: EpochRecord) -> None:
        self.records.append(record)

    def step_ends(self, summary: dict[str, Any]) -> None:
        self.summaries.append(summary)

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Config]:
    return tiny_config


@pytest.fixture(scope="session")
def synthetic() -> Callable[..., MemorySource]:
    return synthetic_images


@pytest.fixture(scope="session")
def context_for() -> Callable[..., Context]:
    return tiny_context


@pytest.fixture(scope="session")
def run_facts() -> Callable[[Path], dict[str, Any]]:
    return facts_of


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


@pytest.fixture(scope="module")
def learned(
    tiny: Callable[..., Config], synthetic: Callable[..., MemorySource], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Learner, Path]:
    """A learner of three steps, and the folder that it was saved to after each."""
    learner, folder = Learner(tiny()), tmp_path_factory.mktemp("learner")
    for step, names in enumerate(("ab", "cd", "ef"), 1):
        learner.learn(synthetic(names), synthetic("abcdef"[: 2 * step], 2, seed=1))
        learner.save(folder)
    return learner, folder


@pytest.fixture
def copy(learned: tuple[Learner, Path], tmp_path: Path) -> Path:
    return shutil.copytree(learned[1], tmp_path / "copy")


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """One thread, as the bit-identity of resumed runs asks for, and no repeated timing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "REPEATS", 1)
        yield
    torch.set_num_threads(threads)
