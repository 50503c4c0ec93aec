"""Image files and everything else in folders and below them, listed by threads with a time limit on every request.

Every folder is listed once, level by level, and links are not followed in circles. Folders that are runs are skipped. Files whose names do
not say what they are get opened, a few hundred at a time.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from der_fast.config.run_folder import DEFAULT_PARENT, EARLY_TRACES, PARTS, has_traces, is_run
from der_fast.data.catalogue.file_table import last_change
from der_fast.data.catalogue.kinds import IMAGE_KINDS, LINK, is_image_name, is_note, is_rubbish, kind_by_name, sniffed_kind
from der_fast.data.io.threads import TIMEOUT, Some, mapped, some

# A folder's device and inode number, or its whole path on systems without them: the same for all links to it.
Identity = tuple[int, int] | str
# Name, bytes, change time in ns.
_File = tuple[str, int, int]

_LOOKED_INTO_AT_ONCE = 64


@dataclass
class Folder:
    """What is directly in a folder.

    Args:
        path: where it is.
        changed: when its entries last changed, in ns.
        identity: what distinguishes it from all others.
        images: the image files, sorted by name.
        left: how many files are left out, by kind.
        folders: names of the folders in it to list.
        unsure: files that must be opened to see what they are.
        run: whether it is certainly a run; then nothing in it is listed unless it was given by name.
        traces: whether it holds something that runs also hold; its images, if it has any, still count.
        empty: whether it is empty.
    """

    path: Path
    changed: int
    identity: Identity
    images: list[_File] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)
    folders: list[str] = field(default_factory=list)
    unsure: list[_File] = field(default_factory=list)
    run: bool = False
    traces: bool = False
    empty: bool = True


@dataclass(frozen=True)
class Tree:
    """A folder and the folders below it that are listed with it.

    Args:
        folders: itself first, then the others sorted by path.
    """

    folders: tuple[Folder, ...]

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.folders[0].path

    @property
    def left(self) -> Counter[str]:
        """How many files are left out, by kind."""
        return sum((folder.left for folder in self.folders), Counter())

    @property
    def holds_images(self) -> bool:
        """Whether there are images in it."""
        return any(folder.images for folder in self.folders)

    @property
    def is_run(self) -> bool:
        """Whether it is a run, or contains runs and no images."""
        left, top = self.left, self.folders[0]
        if self.holds_images or not IMAGE_KINDS.isdisjoint(left):
            return False
        if any(folder.run for folder in self.folders):
            return True
        # A run starts as an empty folder, in the place where runs go.
        begun = top.path.name == DEFAULT_PARENT and all(folder.empty or folder.folders for folder in self.folders)
        return not left and (begun or any(folder.traces for folder in self.folders))


def list_trees(
    places: Sequence[Path],
    timeout: float = TIMEOUT,
    *,
    above: Collection[Identity] = (),
    given: bool = False,
    advance: Callable[[int], object] = lambda done: None,
) -> list[Tree]:
    """List folders with everything below them.

    Args:
        places: the folders.
        timeout: seconds to wait for one folder, or for the first bytes of a few files.
        above: folders that no link may lead back to.
        given: a person named them, so images in a run are listed too, except the run's own.
        advance: called with 1 after every one of `places`.

    Returns:
        A tree for each of them, in order.

    Raises:
        DataError: a folder could not be listed in time.
        OSError: a folder that cannot be listed.
    """
    tops = mapped(_list_given if given else list_folder, places, timeout, advance=advance)
    trees = [[top] for top in tops]
    classes = {top.identity for top in tops}
    barred = classes.union(above)
    seen: list[set[Identity]] = [set() for _ in tops]
    level = list(enumerate(tops))
    while level:
        pending = [(number, folder, folder.path / name) for number, folder in level for name in sorted(folder.folders)]
        found = mapped(list_folder, [path for _, _, path in pending], timeout)
        level = []
        for (number, parent, _), folder in zip(pending, found, strict=True):
            if folder.identity in barred or folder.identity in seen[number]:
                # A linked class folder is listed in its own place; a circle leaves nothing out.
                if folder.identity in classes - {tops[number].identity}:
                    parent.left[LINK] += 1
                continue
            seen[number].add(folder.identity)
            trees[number].append(folder)
            level.append((number, folder))
    whole = [Tree((tree[0], *sorted(tree[1:], key=lambda folder: folder.path.parts))) for tree in trees]
    look_into([folder for tree in whole for folder in tree.folders], timeout)
    return whole


def list_folder(path: Path, *, given: bool = False) -> Folder:
    """List one folder; a run counts as empty unless it was given by name.

    Raises:
        OSError: it cannot be listed.
    """
    facts = path.stat()
    folder = Folder(path, last_change(facts), identity_of(path, facts))
    with os.scandir(path) as entries:
        found = list(entries)
    names = [entry.name for entry in found]
    folder.empty = not names
    folder.traces = has_traces(names)
    folder.run = folder.traces and is_run(path)
    if folder.run and not given:
        return folder
    for entry in found:
        if not is_rubbish(entry.name) and not (folder.run and entry.name in PARTS):
            _sort_in(folder, entry)
    folder.images.sort()
    return folder


def _list_given(path: Path) -> Folder:
    return list_folder(path, given=True)


def identity_of(path: Path, facts: os.stat_result) -> Identity:
    """Return what distinguishes a folder from all others, the same through every link to it."""
    return (facts.st_dev, facts.st_ino) if facts.st_ino else os.path.realpath(path)


def _sort_in(folder: Folder, entry: os.DirEntry[str]) -> None:
    name = entry.name
    if is_folder(entry):
        folder.folders.append(name)
    elif is_image_name(name):
        # Broken links and pipes count too: they are reported when they are read.
        folder.images.append((name, *size_and_time(entry)[:2]))
    elif not is_note(name) and name not in EARLY_TRACES:
        size, changed, mode = size_and_time(entry)
        if stat.S_ISREG(mode) and size:
            folder.unsure.append((name, size, changed))
        elif stat.S_ISREG(mode) or not mode:
            folder.left[kind_by_name(name)] += 1


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one; a circular link is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def size_and_time(entry: os.DirEntry[str] | Path) -> tuple[int, int, int]:
    """Return a file's size, change time in ns, and mode; zeros if the system does not say, which is reported when the file is read."""
    try:
        facts = entry.stat()
    except OSError:
        return 0, 0, 0
    return facts.st_size, last_change(facts), facts.st_mode


def look_into(folders: Sequence[Folder], timeout: float = TIMEOUT) -> None:
    """Sort every file that its name does not identify into the images or the rest of its folder."""
    unsure = [(folder, file) for folder in folders for file in folder.unsure]
    kinds = mapped(_kinds_of, some([str(folder.path / file[0]) for folder, file in unsure], _LOOKED_INTO_AT_ONCE), timeout)
    for (folder, file), kind in zip(unsure, (kind for found in kinds for kind in found), strict=True):
        if kind is None:
            folder.images.append(file)
        else:
            folder.left[kind] += 1
    for folder in folders:
        if folder.unsure:
            folder.images.sort()
            folder.unsure.clear()


def _kinds_of(chunk: Some) -> list[str | None]:
    return [sniffed_kind(Path(path)) for path in chunk.paths]
