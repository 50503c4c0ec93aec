"""The images that a saved run is measured on: those it held out, of every data set that it learned; never one it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from der_fast.config.datasets import absolute
from der_fast.config.schema import DataConfig
from der_fast.data import load_dataset
from der_fast.data.catalogue.file_table import Int64s
from der_fast.data.identity import FILE, identities
from der_fast.data.joined import joined
from der_fast.data.selection import few
from der_fast.data.source import ImageSource, renamed
from der_fast.data.whole import WholeSet, load_whole
from der_fast.errors import DataError
from der_fast.training.provenance import GIVEN, Learned
from der_fast.training.sources import without_empty_classes

if TYPE_CHECKING:
    from der_fast.training.learner import Learner

_MOST_NAMED = 10
# If this share of a class folder's images is known, it is a renamed class; single images of other classes may look alike.
_FAMILIAR = 0.5


@dataclass(frozen=True)
class Measured:
    """Images to measure on.

    Args:
        source: the images; None if there are none.
        notes: what is missing and why, one line each.
        left_out: number of images left out because the run was trained on them.
    """

    source: ImageSource | None
    notes: tuple[str, ...] = ()
    left_out: int = 0


def held_out_images(learner: Learner, config: DataConfig, run: Path) -> Measured:
    """Find the images that a run held out, in all data sets that it learned.

    Args:
        learner: the run's.
        config: the configuration of its data, with the network's input as `image_size`.
        run: its folder, which holds the index of its own data set.
    """
    names, notes, sources = learner.class_names, list[str](), list[ImageSource]()
    for entries in _by_data_set(learner.learned):
        sources += _found_again(entries, names, config, run, notes)
    written = {entry.step for entry in learner.learned}
    before = [name for step, result in enumerate(learner.results, 1) if step not in written for name in result.class_names]
    if before:
        sources += _as_split_now(before, config, run, notes)
    return Measured(joined(sources, names) if sources else None, tuple(notes))


def _by_data_set(entries: Sequence[Learned]) -> list[list[Learned]]:
    groups: list[list[Learned]] = []
    for entry in entries:
        group = next((group for group in groups if (group[0].data, group[0].kind) == (entry.data, entry.kind)), None)
        if group is None:
            groups.append([entry])
        else:
            group.append(entry)
    return groups


@dataclass(frozen=True)
class _Wanted:
    """Held-out images of one data set: identities and sizes, their class names there, and labels into the learner's class names."""

    identities: Int64s
    sizes: Int64s
    names: Sequence[str]
    labels: Int64s


def _wanted(entries: Sequence[Learned], names: Sequence[str]) -> _Wanted:
    position = {name: label for label, name in enumerate(names)}
    rows: list[tuple[int, int, str, int]] = []
    for entry in entries:
        known = [position.get(name, -1) for name in entry.known_as]
        for identity, size, label in zip(entry.held_out.tolist(), entry.sizes.tolist(), entry.labels.tolist(), strict=True):
            # Classes that the learner no longer knows cannot be measured.
            if known[label] >= 0:
                rows.append((identity, size, entry.class_names[label], known[label]))
    return _Wanted(
        np.array([row[0] for row in rows], dtype=np.int64),
        np.array([row[1] for row in rows], dtype=np.int64),
        [row[2] for row in rows],
        np.array([row[3] for row in rows], dtype=np.int64),
    )


def _found_again(entries: list[Learned], names: Sequence[str], config: DataConfig, run: Path, notes: list[str]) -> list[ImageSource]:
    """Return the held-out images of one data set with labels into `names`; notes name what is missing."""
    wanted = _wanted(entries, names)
    if not len(wanted.labels):
        return []
    classes = [names[label] for label in np.unique(wanted.labels).tolist()]
    what = f"{len(wanted.labels):,} held-out image(s) of {len(classes)} class(es) ({few(classes, _MOST_NAMED)})"
    if entries[0].data is None:
        notes.append(f"{what} were {GIVEN} and cannot be read here")
        return []
    own = entries[0].config(config)
    try:
        whole = load_whole(own, cache=run if own.name == config.name else None, in_files=entries[0].kind == FILE)
        source, position, elsewhere = _search(whole, wanted, entries[0].kind)
    except DataError as error:
        notes.append(f"{what} can no longer be read: {error}")
        return []
    there = position >= 0
    for label in np.unique(wanted.labels[~there]).tolist():
        lost, count = int((wanted.labels[~there] == label).sum()), int((wanted.labels == label).sum())
        notes.append(f"{lost:,} of {count:,} held-out image(s) of class {names[label]!r} are no longer in {own.name}")
    notes.extend(f"held-out images of class {old!r} are now in class {new!r} of {own.name}" for old, new in sorted(elsewhere))
    if not there.any():
        return []
    chosen = source.subset(torch.from_numpy(position[there]))
    return [chosen.with_labels(torch.from_numpy(wanted.labels[there]), names)]


def _search(whole: WholeSet, wanted: _Wanted, kind: str) -> tuple[ImageSource, Int64s, set[tuple[str, str]]]:
    """Look for images in a data set, first where they would be today if nothing had changed.

    Returns:
        A source; every image's position in it, or −1 if it is missing; and (class then, class now) for images in another class.
    """
    source = whole.load_test()
    candidates, found = _candidates(source, wanted, kind)
    position = _in_own_class(source, candidates, found, wanted)
    elsewhere: set[tuple[str, str]] = set()
    if (position >= 0).all():
        return source, position, elsewhere
    rest = whole.load_rest()
    more, found_more = _candidates(rest, wanted, kind)
    candidates, found = np.concatenate([candidates, more + len(source)]), np.concatenate([found, found_more])
    source = source.concatenated(rest)
    position = _in_own_class(source, candidates, found, wanted)
    lost = np.flatnonzero(position < 0)
    position[lost] = _matched(wanted.identities[lost], candidates, found)
    labels = source.labels.numpy()
    for index in lost[position[lost] >= 0].tolist():
        elsewhere.add((wanted.names[index], source.class_names[int(labels[position[index]])]))
    return source, position, elsewhere


def _candidates(source: ImageSource, wanted: _Wanted, kind: str) -> tuple[Int64s, Int64s]:
    """Return the positions and identities of the images that may match: of files, those with a matching size."""
    positions = np.arange(len(source), dtype=np.int64)
    if kind == FILE:
        positions = np.flatnonzero(np.isin(source.sizes, wanted.sizes))
    found = identities(source, kind, torch.from_numpy(positions))
    if found is None:
        raise DataError("it was learned from files, but now there are only images in memory")
    return positions, found


def _in_own_class(source: ImageSource, candidates: Int64s, found: Int64s, wanted: _Wanted) -> Int64s:
    """Return the positions of the wanted images, −1 if one is not in its own class: others may look the same."""
    position = np.full(len(wanted.labels), -1, dtype=np.int64)
    labels = source.labels.numpy()[candidates]
    names = np.array(wanted.names, dtype=object)
    for label, name in enumerate(source.class_names):
        there, here = np.flatnonzero(labels == label), np.flatnonzero(names == name)
        position[here] = _matched(wanted.identities[here], candidates[there], found[there])
    return position


def _matched(wanted: Int64s, positions: Int64s, found: Int64s) -> Int64s:
    """Return for every wanted identity the position of an image with it, or −1."""
    if not len(found):
        return np.full(len(wanted), -1, dtype=np.int64)
    order = np.argsort(found, kind="stable")
    place = np.minimum(np.searchsorted(found[order], wanted), len(found) - 1)
    nearest = order[place]
    matched: Int64s = np.where(found[nearest] == wanted, positions[nearest], -1)
    return matched


def _as_split_now(names: Sequence[str], config: DataConfig, run: Path, notes: list[str]) -> list[ImageSource]:
    """Return substitutes for the held-out images of classes without a record."""
    what = f"the images held out of {len(names)} class(es) ({few(names, _MOST_NAMED)}) were not recorded when they were learned"
    if config.name == GIVEN:
        notes.append(f"{what}, and they were {GIVEN}: these classes are not measured")
        return []
    try:
        _, test = load_dataset(config, cache=run)
    except DataError as error:
        notes.append(f"{what}, and the data set cannot be read: {error}")
        return []
    present = [name for name in names if name in test.class_names]
    lost = [name for name in names if name not in test.class_names]
    also = f"; {config.name} has no {', '.join(map(repr, lost[:_MOST_NAMED]))}" if lost else ""
    notes.append(f"{what}: the test images of {config.name} as it is split now are used instead{also}")
    return [test.of_classes(present)] if present else []


def images_of(learner: Learner, config: DataConfig) -> Measured:
    """Return the images of a given data set to measure on, without those that the learner was trained on.

    Args:
        learner: knows what it was trained on.
        config: the data set, with the network's input as `image_size`.

    Raises:
        DataError: there are no images, or it was trained on all of them.
    """
    whole = load_whole(config, in_files=True if any(entry.kind == FILE for entry in learner.learned) else None)
    unwritten = len({*range(1, len(learner.results) + 1)} - {entry.step for entry in learner.learned})
    own = unwritten > 0 and absolute(config.name) == absolute(learner.config.data.name)
    source, notes = whole.load_test() if own else whole.to_measure(), list(whole.notes)
    if whole.empty:
        notes.append(f"no images in class(es) {few([repr(name) for name in whole.empty], _MOST_NAMED)} of {config.name}")
    known = torch.zeros(len(source), dtype=torch.bool)
    called = _known_names(learner, source)
    for kind in sorted({entry.kind for entry in learner.learned}):
        found, entries = identities(source, kind), [entry for entry in learner.learned if entry.kind == kind]
        if found is None:
            notes.append("images in memory cannot be compared with the files that the run was trained on")
            continue
        known |= torch.from_numpy(np.isin(found, np.concatenate([entry.trained.numpy() for entry in entries])))
        called = {**_seen_as(learner, source, found, entries), **called}
    if called:
        notes += [f"class {there!r} of {config.name} is the class that the run calls {name!r}" for there, name in sorted(called.items())]
        source = renamed(source, called)
    if unwritten:
        what = (
            "the images that would be held out today are measured"
            if own
            else "training images cannot be told from others and count as test images"
        )
        notes.append(
            f"the training images of {unwritten} of {len(learner.results)} step(s) were not recorded when they were learned: "
            f"of {config.name}, {what}"
        )
    left_out = int(known.sum())
    if left_out == len(source):
        raise DataError(f"the run was trained on all {left_out:,} image(s) of {config.name}; give images that it has not seen")
    if left_out:
        notes.append(f"{left_out:,} of {len(source):,} image(s) of {config.name} are left out because the run was trained on them")
        source = source.subset((~known).nonzero().flatten())
    return Measured(without_empty_classes(source), tuple(notes), left_out)


def _known_names(learner: Learner, source: ImageSource) -> dict[str, str]:
    """Return the learner's names for classes that it learned under another name: name in the source → learner's name."""
    names = {there: name for entry in learner.learned for there, name in zip(entry.class_names, entry.known_as, strict=True)}
    return _without_doubt(learner, source, {name: {names[name]} for name in source.class_names if name in names})


def _seen_as(learner: Learner, source: ImageSource, found: Int64s, entries: Sequence[Learned]) -> dict[str, str]:
    """Return the learner's names for differently named classes if it knows half of their images: name in the source → learner's name."""
    labels, classes = source.labels.numpy(), dict[str, set[str]]()
    known = np.isin(found, np.concatenate([part.numpy() for entry in entries for part in (entry.trained, entry.held_out)]))
    for entry in entries:
        place = _matched(entry.held_out.numpy(), np.arange(len(found)), found)
        for label, position in zip(entry.labels[place >= 0].tolist(), place[place >= 0].tolist(), strict=True):
            classes.setdefault(source.class_names[int(labels[position])], set()).add(entry.known_as[label])
    share = {name: known[labels == source.class_names.index(name)].mean() for name in classes}
    return _without_doubt(learner, source, {name: called for name, called in classes.items() if share[name] >= _FAMILIAR})


def _without_doubt(learner: Learner, source: ImageSource, classes: dict[str, set[str]]) -> dict[str, str]:
    """Keep classes whose names in the source the learner does not know and that match exactly one class it knows."""
    return {
        name: known
        for name, (known, *others) in classes.items()
        if not others and name not in learner.class_names and known in learner.class_names and known not in source.class_names
    }


def without_limits(config: DataConfig, name: str, side: int) -> DataConfig:
    """Return the configuration that loads all of another data set, for a network input of `side` pixels."""
    return replace(config, name=name, image_size=side, train_per_class=None, test_per_class=None, classes=None, test_list=None)
