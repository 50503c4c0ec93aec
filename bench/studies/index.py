"""The cost of a data set of ImageNet's size before the first image is decoded, and the memory of herding over it.

    python -m bench index --json FILE

A tree of empty files is created (`train/<class>/` and `val/<class>/`), listed, saved and read back. Then a step's list is made as in a
run: a choice of classes, joined with a rehearsal memory, and its checksum. Finally the memory is filled by herding over every image of the
tree, with features from a random generator, since the network's time is not measured here.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness.arguments import study_parser
from der_fast.compaction.bank import FrozenBank
from der_fast.config.schema import Config, DataConfig, MemoryConfig, RuntimeConfig
from der_fast.data import load_dataset, transforms_for
from der_fast.data.catalogue.cache import save_index
from der_fast.data.catalogue.index import build_index, open_index
from der_fast.data.photos import PhotoSource
from der_fast.data.read.library import Library
from der_fast.data.read.walk import Loaded, Reader, Walk
from der_fast.model.architecture import build_architecture
from der_fast.seeds import generator
from der_fast.training.context import Context
from der_fast.training.model import Model, Network
from der_fast.training.rehearsal import refill, rehearsal

LIMITS = {"load the index": 2.0, "list of a step": 0.5}
SIDE = 8


def lay_out(place: Path, images: int, classes: int) -> None:
    """Write the tree: empty files named like ImageNet's, with an eighth as many in val/ as in train/, at most 50 per class."""

    def fill(number: int) -> None:
        for part, count in (("train", len(range(number, images, classes))), ("val", min(50, images // classes // 8 + 1))):
            folder = place / part / f"n{number:08d}"
            folder.mkdir(parents=True)
            for index in range(count):
                (folder / f"n{number:08d}_{index:08d}.JPEG").touch()
            # A folder changed a moment ago counts as one that may still change, and would be listed again.
            os.utime(folder, (1e9, 1e9))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fill, range(classes)))


class NoReader:
    """Returns images without reading any; see `Reader`."""

    name = "none"

    def read(self, walk: Walk) -> Iterator[Loaded]:
        """Yield black images for every batch of a walk."""
        for number, positions in walk.rest:
            yield Loaded(torch.zeros(1, 1, 1, 3).expand(len(positions), *walk.transform.size, 3), positions, number)

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


class UnreadLibrary(Library):
    """A library whose files are never opened."""

    def reader(self) -> Reader:
        """Return a reader of black images."""
        return NoReader()


class RandomFeatures(nn.Module):
    """Features from a random generator, for any images.

    Args:
        features: how many.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features, self.chance = features, generator(0, "features")

    def forward(self, images: Tensor) -> Tensor:
        """Return (n, features)."""
        return torch.rand(len(images), self.features, generator=self.chance)


def timed(work: Callable[[], Any], repeat: int = 3) -> tuple[float, Any]:
    """Return the median seconds of a call, and the last call's result."""
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


def peak_mib(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the largest growth of resident memory during a call, in MiB, and the call's result (Linux)."""
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")
    before = int(status.read_text().split("VmHWM:")[1].split()[0])
    result = work()
    return (int(status.read_text().split("VmHWM:")[1].split()[0]) - before) / 1024, result


def step_list(train: PhotoSource, memory: PhotoSource, known: list[str], new: list[str]) -> PhotoSource:
    """Return new classes and memory joined as in a run's step, up to the checksum that names the task."""
    images = train.of_classes(new)
    images.fingerprint()
    model = Model(Network(build_architecture("resnet20")), memory=memory, class_sets=[tuple(known)])
    whole = rehearsal(model, images)
    assert isinstance(whole, PhotoSource)
    return whole


def measure_lists(folder: Path, cache: Path, classes: int, memory: int) -> tuple[list[dict[str, Any]], PhotoSource]:
    """Return rows about the index and a step's list, and the training images."""
    seconds, index = timed(lambda: build_index(folder), 1)
    rows = [{"what": "list the tree", "seconds": seconds}]
    rows.append({"what": "keep the index", "seconds": timed(lambda: save_index(cache / "index.npz", index), 1)[0]})
    seconds, (_, note) = timed(lambda: open_index(folder, cache))
    assert "made" not in note, note
    rows.append({"what": "load the index", "seconds": seconds})
    config = DataConfig(name=str(folder), image_size=SIDE, random_resized_crop=True, reader="pillow", workers=0)
    seconds, (train, _) = timed(lambda: load_dataset(config, cache=cache), 1)
    assert isinstance(train, PhotoSource)
    rows.append({"what": "open the data set", "seconds": seconds})
    names = list(train.class_names)
    known, new = names[: classes // 2], names[classes // 2 : classes // 2 + max(1, classes // 10)]
    held = train.of_classes(known)
    kept = held.subset(torch.linspace(0, len(held) - 1, memory).long())
    seconds, whole = timed(lambda: step_list(train, kept, known, new))
    assert len(whole) == len(train.of_classes(new)) + memory
    return [*rows, {"what": "list of a step", "seconds": seconds, "images": len(whole)}], train


def measure_herding(train: PhotoSource, features: int, memory: int) -> dict[str, Any]:
    """Return a row about filling the memory from all images."""
    train = replace(train, library=UnreadLibrary(train.library.settings))
    data = DataConfig(image_size=SIDE, random_resized_crop=True)
    config = Config(data=data, memory=MemoryConfig(total=memory), runtime=RuntimeConfig(eval_batch_size=256))
    context = Context(config, torch.device("cpu"), *transforms_for(data, train.image_size))
    bank = FrozenBank()
    bank.extractors.append(RandomFeatures(features))
    model = Model(Network(build_architecture("resnet20"), bank), class_sets=[train.class_names])
    started = time.perf_counter()
    peak, filled = peak_mib(lambda: refill(context, model, None, train))
    assert filled is not None and len(filled) == memory // len(train.class_names) * len(train.class_names)
    whole = len(train) * features * 4 / 2**20
    return {
        "what": "herding",
        "seconds": time.perf_counter() - started,
        "peak_mib": peak,
        "all_features_mib": whole,
        "says": train.notes[-1],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = study_parser("index", __doc__)
    parser.add_argument("--images", type=int, default=1_281_167, help="training images")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--memory", type=int, default=20_000, help="exemplars in total")
    parser.add_argument("--features", type=int, default=512, help="features per image, for herding; 0 skips herding")
    parser.add_argument("--tree", type=Path, help="a folder for the tree, which is kept for the next run; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.tree or Path(scratch) / "tree"
        if not folder.exists():
            lay_out(folder, options.images, options.classes)
        rows, train = measure_lists(folder, Path(scratch), options.classes, options.memory)
        if options.features:
            rows.append(measure_herding(train, options.features, options.memory))
    print(f"{len(train):,} training images in {options.classes} classes")
    for row in rows:
        limit = LIMITS.get(row["what"])
        facts = [f"{row['seconds']:.3f} s", *([f"limit {limit} s"] if limit else [])]
        if "peak_mib" in row:
            facts += [f"memory grew by {row['peak_mib']:.0f} MiB; all features at once: {row['all_features_mib']:,.0f} MiB", row["says"]]
        print(f"{row['what']:20} {'; '.join(facts)}")
    if options.json:
        options.json.write_text(json.dumps({"images": len(train), "classes": options.classes, "rows": rows}, indent=1) + "\n")
