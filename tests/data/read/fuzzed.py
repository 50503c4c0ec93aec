"""Reads a folder of mutated JPEGs; run by test_fuzz.py in a process of its own, so that a crash is seen.

python fuzzed.py FOLDER READER SEED COUNT
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from der_fast.config.schema import DataConfig
from der_fast.data import load_dataset, transforms_for
from der_fast.data.read.library import Library
from der_fast.seeds import generator


def shipped(package: str, path: str) -> Path:
    """Return a file of an installed package without importing it."""
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / path


# Real photos that ship with what der_fast depends on.
PHOTOS = [
    shipped("sklearn", "datasets/images/flower.jpg"),
    shipped("sklearn", "datasets/images/china.jpg"),
    shipped("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Change, cut, drop, insert or zero some bytes; in half of the cases in the header."""
    changed, near = bytearray(data), len(data) if chance.random() < 0.5 else min(len(data), 700)
    at, length = chance.randrange(near), chance.randrange(1, 2000)
    mutations: list[Callable[[], None]] = [
        lambda: [changed.__setitem__(chance.randrange(near), chance.randrange(256)) for _ in range(chance.randrange(1, 20))] and None,
        lambda: changed.__delitem__(slice(at, None)),
        lambda: changed.__delitem__(slice(at, at + length)),
        lambda: changed.__setitem__(slice(at, at), chance.randbytes(length // 10)),
        lambda: changed.__setitem__(slice(at, at + length), bytes(length)),
        lambda: changed.__setitem__(at, changed[at] ^ (1 << chance.randrange(8))),
    ]
    chance.choice(mutations)()
    return bytes(changed)


def main(folder: Path, reader: str, seed: int, count: int) -> None:
    """Write the files, read them all, and say what became of them."""
    chance = random.Random(seed)
    originals = [path.read_bytes() for path in PHOTOS]
    for part, files in (("train", count), ("val", 2)):
        for index in range(files):
            path = folder / part / "ab"[index % 2] / f"{index:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            data = originals[index % len(originals)]
            path.write_bytes(mutated(data, chance) if part == "train" else data)
    config = DataConfig(name=str(folder), random_resized_crop=True, image_size=64, reader=reader, workers=2)
    train, _ = load_dataset(config)
    transform, _ = transforms_for(config, train.image_size)
    # So many broken files would rightly stop a run.
    counted = Library._note_problems
    Library._note_problems = lambda self, loaded, found, total: counted(self, loaded, 0, total)  # type: ignore[method-assign]
    read = 0
    for batch in train.batches(None, 32, transform=transform, generator=generator(seed), shuffle=True):
        assert torch.isfinite(batch.images).all() and torch.equal(batch.labels, train.labels[batch.indices])
        read += len(batch.indices)
    print(f"read {read} skipped {len(train.skipped)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
