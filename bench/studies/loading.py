"""How fast photos are read for training: a torch DataLoader with Pillow, a bare DALI pipeline, der_fast on DALI, and its resident cache.

    python -m bench loading --photos FOLDER_OR_TAR --json FILE

All variants read the same files with the same two cores and give the same output: random-resized crops of 224 pixels, half of them
mirrored, normalised, float32. The variants take turns, so that other load on the machine affects all of them equally.

    python -m bench loading --train FOLDER --photos … --json FILE

also trains ResNet-18 on a folder of class folders (two steps, reading the photos from their files) and reports the share of the time that
it waited for images.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.harness.arguments import study_parser
from der_fast import api
from der_fast.config.schema import DataConfig
from der_fast.data import load_dataset, transforms_for
from der_fast.data.augment.draws import random_windows, uniform
from der_fast.data.read.dali import is_installed
from der_fast.seeds import generator

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 224
CLASSES = 2
# Untimed batches at the start: as many as any variant reads ahead.
AHEAD = 4


def unpack(photos: Path, place: Path, repeat: int) -> Path:
    """Lay the photos out as class folders, each photo `repeat` times; return the folder."""
    if photos.is_file():
        with tarfile.open(photos) as archive:
            archive.extractall(place / "photos", filter="data")
        photos = place / "photos"
    files = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise SystemExit(f"no JPEGs in {photos}")
    for index in range(repeat * len(files)):
        for part in ("train", "val"):
            target = place / "set" / part / f"class{index % CLASSES}" / f"{index:06d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            if part == "train" or index < 2 * CLASSES:
                os.link(files[index % len(files)], target) if photos.is_relative_to(place) else target.symlink_to(files[index % len(files)])
    return place / "set"


class PillowFiles(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """What a training script does without der_fast: open, crop, resize, mirror, normalise, one image at a time."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.mean, self.std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.files[index]) as opened:
            image = opened.convert("RGB")
        numbers = uniform(random.getrandbits(60), np.array([index]))
        top, left, height, width = random_windows(numbers, np.array([image.height]), np.array([image.width]))[0].tolist()
        image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
        return pixels.sub_(self.mean).div_(self.std), index % CLASSES


def dataloader_pillow(files: list[Path], batch: int, threads: int) -> Callable[[], Iterator[Any]]:
    """Return a function that iterates over the images once."""
    loader = torch.utils.data.DataLoader(PillowFiles(files), batch_size=batch, shuffle=True, num_workers=threads, persistent_workers=True)
    return lambda: (images for images, _ in loader)


def dali_bare(files: list[Path], batch: int, threads: int) -> Callable[[], Iterator[Any]]:
    """Return a function that iterates over the images once with DALI's own reader and iterator, without der_fast."""
    import nvidia.dali.fn as fn
    import nvidia.dali.types as types
    from nvidia.dali.pipeline import Pipeline
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    pipeline = Pipeline(batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=2, seed=1)
    with pipeline:
        encoded, label = fn.readers.file(files=[str(path) for path in files], random_shuffle=True, name="files")
        images = fn.decoders.image_random_crop(encoded, device="cpu", output_type=types.RGB)
        images = fn.resize(images, size=[SIDE, SIDE], interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(),
            mean=[255 * value for value in MEAN],
            std=[255 * value for value in STD],
            dtype=types.FLOAT,
            output_layout="HWC",
        )
        pipeline.set_outputs(images, label)
    loader = DALIGenericIterator(
        [pipeline], ["images", "label"], reader_name="files", last_batch_policy=LastBatchPolicy.PARTIAL, auto_reset=True
    )
    return lambda: (rows[0]["images"] for rows in loader)


def source_of(folder: Path, batch: int, threads: int, cache_gib: float, device: str = "cpu") -> Callable[[], Iterator[Any]]:
    """Return a function that iterates over the images once with der_fast; for a GPU, DALI decodes there and batches are made there."""
    config = DataConfig(
        name=str(folder),
        image_size=SIDE,
        random_resized_crop=True,
        crop_padding=0,
        brightness=0.0,
        mean=MEAN,
        std=STD,
        reader="dali" if is_installed() else "pillow",
        workers=threads,
        cache_gib=cache_gib,
    )
    train, _ = load_dataset(config)
    transform, _ = transforms_for(config, train.image_size)
    epochs = iter(range(10**9))

    def once() -> Iterator[Any]:
        chance = generator(0, "bench", next(epochs))
        batches = train.batches(None, batch, transform=transform, generator=chance, shuffle=True, device=device)
        return (found.images for found in batches)

    return once


def measure(once: Callable[[], Iterator[Any]]) -> float:
    """Return images per second of one pass; every batch is read.

    The clock starts after the first batches, since some variants read them ahead during another variant's turn.
    """
    started, count = 0.0, 0
    for number, images in enumerate(once(), 1):
        count += len(images)
        images[0, 0, 0, 0].item()
        if number == AHEAD:
            started, count = time.perf_counter(), 0
    return count / (time.perf_counter() - started)


def train(folder: Path, side: int, epochs: int, threads: int) -> dict[str, Any]:
    """Return how long a run over a folder of photos trained, and how much of that it waited for images."""
    settings: dict[str, Any] = {
        "data.image_size": side,
        "data.random_resized_crop": True,
        "data.workers": threads,
        "model.backbone": "resnet18",
        "model.stem": "imagenet",
        "runtime.device": "cpu",
        "runtime.threads": threads,
    }
    for stage in ("first", "later", "classifier"):
        settings |= {f"{stage}.epochs": epochs, f"{stage}.milestones": (), f"{stage}.warmup_epochs": 0, f"{stage}.batch_size": 32}
    metrics = api.train(folder, "B0-2", settings=settings).metrics
    spent, waited = sum(metrics["training_seconds"]), sum(metrics["data_seconds"])
    return {"side": side, "training_seconds": round(spent, 2), "data_seconds": round(waited, 2), "share": round(waited / spent, 4)}


def keep_to(cores: int) -> None:
    """Limit this process and its children to this many cores, so that threads that a variant does not count have their cost too."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = study_parser("loading", __doc__)
    parser.add_argument("--photos", type=Path, default=Path("../shared/data/imagenet_photos.tar"), help="folder or tar of JPEGs")
    parser.add_argument("--repeat", type=int, default=16, help="how often every photo occurs in an epoch")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2, help="cores for every variant")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train", type=Path, help="also train on this folder of class folders and report how long it waited for images")
    parser.add_argument("--side", type=int, default=112, help="pixels, for --train")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of every stage, for --train")
    parser.add_argument("--gpu", action="store_true", help="also decode and cache on the GPU")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_to(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = unpack(options.photos, Path(scratch), options.repeat)
        files = sorted((folder / "train").rglob("*.jpg"))
        if len(files) < 4 * AHEAD * options.batch:
            raise SystemExit(f"{len(files)} images are too few for batches of {options.batch}: repeat them more often, or pass more")
        sizes = (options.batch, options.threads)
        variants = {"dataloader_pillow": dataloader_pillow(files, *sizes)}
        if is_installed():
            variants["dali_bare"] = dali_bare(files, *sizes)
        variants["ours"] = source_of(folder, *sizes, 0.0)
        variants["resident_cache"] = source_of(folder, *sizes, 8.0)
        if options.gpu:
            variants |= {"ours_gpu": source_of(folder, *sizes, 0.0, "cuda"), "resident_cache_gpu": source_of(folder, *sizes, 8.0, "cuda")}
        speeds: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(options.rounds + 1):
            for name, once in variants.items():
                speed = measure(once)
                # The first pass makes pipelines, starts processes, and fills caches.
                if number:
                    speeds[name].append(speed)
    rows: list[dict[str, Any]] = [
        {"variant": name, "images_per_s": round(statistics.median(found), 1), "low": round(min(found), 1), "high": round(max(found), 1)}
        for name, found in speeds.items()
    ]
    base = rows[0]["images_per_s"]
    print(f"{len(files)} images of {SIDE} × {SIDE}, batch {options.batch}, {options.threads} cores, median of {options.rounds}")
    for row in rows:
        print(f"{row['variant']:20} {row['images_per_s']:8.1f} images/s ({row['low']} … {row['high']})  × {row['images_per_s'] / base:.2f}")
    facts: dict[str, Any] = {"threads": options.threads, "batch": options.batch, "rounds": options.rounds, "rows": rows}
    if options.train:
        facts["training"] = found = train(options.train, options.side, options.epochs, options.threads)
        print(
            f"training ResNet-18 at {options.side} pixels: {found['training_seconds']} s, of which {found['data_seconds']} s waiting for "
            f"images ({100 * found['share']:.2f} %)"
        )
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
