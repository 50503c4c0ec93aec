"""What a run learned, step by step: the data set, the images it was trained on, and those it held out for testing.

    DIR/learned/NN-<checksum>.safetensors    identities of step NN's images; places and class names are in the state's manifest

Images are identified by their content (`data.identity`), not by their paths, so they are found even if files or class folders were
moved or renamed, and recognised in another split. A training image takes 8 bytes, a held-out one 20.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from der_fast.config.datasets import absolute, data_folder
from der_fast.config.key import Change
from der_fast.config.schema import DataConfig
from der_fast.config.tree import keys_with
from der_fast.data.identity import FILE, UNREADABLE, identities, kind_of
from der_fast.data.source import ImageSource
from der_fast.errors import CheckpointError, DataError
from der_fast.training.sources import counts_by_class
from der_fast.training.storage.named_files import load_tensors, save_named_tensors

FOLDER = "learned"
# The data set's name in the configuration of a run that was given image sources or data sets.
GIVEN = "given as datasets"
# The keys of a data configuration that decide which images a data set has and which are held out.
_KEYS = ("name", "root", "test_list", "classes", "train_per_class", "test_per_class", "test_share")
_PLACE_KEYS = tuple(key.removeprefix("data.") for key in keys_with(Change.PLACE))


@dataclass(frozen=True)
class Origin:
    """Where the images of a step come from.

    Args:
        data: how they were loaded; None if they were given as image sources or data sets.
        held_out: the test images that belong to the step's training images; None if there are none.
        notes: notes for the report about the images measured after the step.
    """

    data: DataConfig | None
    held_out: ImageSource | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Learned:
    """The images that one step learned, and those it held out.

    Args:
        step: 1-based.
        data: the keys of the data configuration that locate the images; None if they were given as Python objects.
        kind: what identifies images, `FILE` or `PIXELS`.
        fingerprint: the training images' checksum.
        class_names: the data set's names of the classes.
        known_as: the learner's names of the same classes.
        trained: (N,) int64: identities of the training images, sorted and distinct.
        held_out: (M,) int64: identities of the test images.
        labels: (M,) int32: positions in `class_names`.
        sizes: (M,) int64: bytes of the files; 0 for images in memory.
    """

    step: int
    data: dict[str, Any] | None
    kind: str
    fingerprint: str
    class_names: tuple[str, ...]
    known_as: tuple[str, ...]
    trained: Tensor
    held_out: Tensor
    labels: Tensor
    sizes: Tensor

    @property
    def name(self) -> str:
        """The data set's name or place."""
        return GIVEN if self.data is None else str(self.data["name"])

    def config(self, base: DataConfig) -> DataConfig:
        """Return the configuration that loads the data set, with everything else from `base`; not for images given as objects."""
        assert self.data is not None
        classes = self.data["classes"]
        return replace(base, **{**self.data, "classes": None if classes is None else tuple(classes)})


def origin_of(config: DataConfig, held_out: ImageSource | None, notes: Sequence[str] = ()) -> Origin:
    """Return the origin of images loaded with `config`."""
    return Origin(None if config.name == GIVEN else config, held_out, tuple(notes))


def own_test_images(train: ImageSource, test: ImageSource | None) -> ImageSource | None:
    """Return the test images of the trained classes; None if there are none."""
    if test is None:
        return None
    counts = counts_by_class(test)
    names = [name for name in train.class_names if counts.get(name)]
    return test.of_classes(names) if names else None


def learned(step: int, train: ImageSource, origin: Origin) -> Learned:
    """Record what a step learned; raises DataError if a drive does not respond.

    Args:
        step: 1-based.
        train: all of its images except the rehearsal memory.
        origin: where they come from; its `held_out` may have other classes too.
    """
    test, kind = origin.held_out, kind_of(train)
    names = tuple(dict.fromkeys([*train.class_names, *(test.class_names if test is not None else ())]))
    trained = _identities(train, kind)
    held_out, labels, sizes = np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int64)
    if test is not None and (found := identities(test, kind)) is not None:
        read = found != UNREADABLE
        held_out, labels = found[read], test.relabelled(names).labels.numpy().astype(np.int32)[read]
        sizes = test.sizes[read] if kind == FILE else np.zeros_like(held_out)
    return Learned(
        step,
        None if origin.data is None else _facts(origin.data),
        kind,
        train.fingerprint(),
        names,
        names,
        torch.from_numpy(np.unique(trained[trained != UNREADABLE])),
        torch.from_numpy(held_out),
        torch.from_numpy(labels),
        torch.from_numpy(sizes),
    )


def _identities(source: ImageSource, kind: str) -> Any:
    found = identities(source, kind)
    assert found is not None
    return found


def _facts(data: DataConfig) -> dict[str, Any]:
    facts = {key: value for key, value in asdict(data).items() if key in _KEYS}
    if data_folder(data.name) is not None:
        facts["name"] = absolute(data.name)
    if data.test_list is not None:
        facts["test_list"] = absolute(data.test_list)
    return {**facts, "classes": None if data.classes is None else list(data.classes)}


def moved(entries: Sequence[Learned], old: DataConfig, new: DataConfig) -> list[Learned]:
    """Return the entries with the data set's place changed from `old` to `new`."""
    before, now = _facts(old), _facts(new)
    place = {key: now[key] for key in _PLACE_KEYS}

    def at_new(entry: Learned) -> Learned:
        if entry.data is None or any(entry.data[key] != before[key] for key in _PLACE_KEYS):
            return entry
        return replace(entry, data={**entry.data, **place})

    return [at_new(entry) for entry in entries]


def renamed(entries: Sequence[Learned], old: str, new: str) -> list[Learned]:
    """Return the entries with the learner's name `old` changed to `new`; their images stay known under any folder name."""
    return [replace(entry, known_as=tuple(new if name == old else name for name in entry.known_as)) for entry in entries]


def forgotten(entries: Sequence[Learned], names: Sequence[str]) -> list[Learned]:
    """Return the entries without the held-out images of forgotten classes. Training images stay recorded: they were trained on."""

    def without(entry: Learned) -> Learned:
        gone = torch.tensor([name in names for name in entry.known_as])
        if not gone.any():
            return entry
        stays = ~gone[entry.labels.long()]
        known_as = tuple("" if name in names else name for name in entry.known_as)
        held_out, labels, sizes = (values[stays] for values in (entry.held_out, entry.labels, entry.sizes))
        return replace(entry, known_as=known_as, held_out=held_out, labels=labels, sizes=sizes)

    return [without(entry) for entry in entries]


def save_learned(run: Path, entries: Sequence[Learned]) -> list[dict[str, Any]]:
    """Write the records that are not yet there, and return their rows in the manifest; raises StorageError."""
    return [
        {
            **save_named_tensors(run / FOLDER, f"{entry.step:02d}", {name: getattr(entry, name) for name in _TENSORS}),
            **{name: getattr(entry, name) for name in ("step", "data", "kind", "fingerprint")},
            "class_names": list(entry.class_names),
            "known_as": list(entry.known_as),
        }
        for entry in entries
    ]


_TENSORS = ("trained", "held_out", "labels", "sizes")


def load_learned(run: Path, rows: Sequence[dict[str, Any]], warn: Callable[[str], None]) -> list[Learned]:
    """The inverse of `save_learned`; a damaged entry is reported and skipped."""
    entries = []
    for row in rows:
        try:
            tensors = load_tensors(run / FOLDER / row["file"], row["sha256"])
            facts: dict[str, Any] = {name: row[name] for name in ("step", "data", "kind", "fingerprint")}
            facts.update((name, tuple(row[name])) for name in ("class_names", "known_as"))
            facts.update((name, tensors[name]) for name in _TENSORS)
            entries.append(Learned(**facts))
        except (CheckpointError, KeyError, TypeError) as error:
            warn(f"which images step {row.get('step')} learned can no longer be read: {error}")
    return entries


def try_learned(step: int, train: ImageSource, origin: Origin, say: Callable[[str], None]) -> list[Learned]:
    """Return what `learned` does as a list; if a drive no longer responds, an empty one, so that the step is not lost."""
    try:
        return [learned(step, train, origin)]
    except DataError as error:
        say(f"which images step {step} learned could not be recorded: {error}")
        return []
