"""The resident cache: images decoded once, with their short side at the stored size, and cropped from memory from then on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from der_fast.data.augment.draws import Ints
from der_fast.data.decode.encoded import open_upright
from der_fast.data.decode.pixels import reason_of, to_rgb
from der_fast.data.io.members import read_bytes
from der_fast.data.io.progress import progress_bar
from der_fast.data.io.threads import FileThreads
from der_fast.data.read.finishing import cut, finish
from der_fast.data.read.walk import Loaded, ReadSettings, Walk
from der_fast.errors import DataError

# Photos that are not decoded yet are assumed to be 4:3, as most are.
_USUAL_ASPECT = 4 / 3
# Files decoded between two checks whether they fit.
_CHUNK = 1024


class Resident:
    """Holds decoded images on a device within a budget, and reads walks from them; see `Reader`.

    Args:
        settings: `workers`, `prefetch` and `timeout` are used.
        budget: bytes.
        device: where the images are held.
        say: called with what became of the cache.
    """

    name = "resident cache"

    def __init__(self, settings: ReadSettings, budget: float, device: torch.device, say: Callable[[str], None]) -> None:
        self.settings, self.budget, self.device, self.say = settings, budget, device, say
        self.used = 0
        self._images: dict[str, Tensor] = {}
        self._broken: dict[str, str] = {}
        self._too_many: int | None = None
        self._threads: FileThreads | None = None

    def holds(self, walk: Walk) -> bool:
        """Make every image of a walk resident if all fit in the budget, and return whether they do."""
        if self._too_many is not None and sum(map(len, walk.batches)) >= self._too_many:
            return False
        wanted = {walk.path(position) for batch in walk.batches for position in batch.tolist()}
        missing = sorted(wanted - self._images.keys() - self._broken.keys())
        side = walk.transform.stored_size[0]
        # Decided by what is wanted, not by what is there already: a resumed run must read from the same place as before.
        fits = len(wanted) * 3 * side * side * _USUAL_ASPECT <= self.budget
        if fits and not missing:
            return True
        if self.used + len(missing) * 3 * side * side * _USUAL_ASPECT > self.budget:
            self._forget_others(wanted)
        if not fits or not self._fill(missing, side, wanted):
            self._too_many = len(wanted)
            self._forget_others(set())
            self.say(
                f"resident cache: {len(wanted):,} images do not fit in {self.budget / 2**30:.3g} GiB, so they are decoded again every time"
            )
            return False
        self.say(f"resident cache: {len(self._images):,} images decoded once, {self.used / 2**30:.3g} of {self.budget / 2**30:.3g} GiB")
        return True

    def _forget_others(self, wanted: set[str]) -> None:
        for path in [path for path in self._images if path not in wanted]:
            self.used -= self._images.pop(path).numel()

    def _fill(self, paths: list[str], side: int, wanted: set[str]) -> bool:
        """Decode files; stop and return False as soon as the wanted images exceed the budget."""
        with progress_bar("decoding into the resident cache", len(paths)) as advance:
            for start in range(0, len(paths), _CHUNK):
                chunk = paths[start : start + _CHUNK]
                parts = [self._pool().submit(_decoded, path, side) for path in chunk]
                for path, part in zip(chunk, parts, strict=True):
                    try:
                        image = part.result(self.settings.timeout)
                    except FutureTimeout:
                        raise DataError(f"reading {path} took longer than data.timeout={self.settings.timeout:g} seconds") from None
                    if isinstance(image, str):
                        self._broken[path] = image
                        continue
                    self._images[path] = image.to(self.device)
                    self.used += image.numel()
                advance(len(chunk))
                if self.used > self.budget:
                    self._forget_others(wanted)
                if self.used > self.budget:
                    return False
        return True

    def _pool(self) -> FileThreads:
        if self._threads is None:
            self._threads = FileThreads(max(self.settings.workers, 1), "der_fast-resident")
        return self._threads

    def read(self, walk: Walk) -> Iterator[Loaded]:
        """Yield the batches of a walk in order; see `Reader.read`."""
        ahead: deque[tuple[Loaded, list[Future[None]]]] = deque()
        for number, positions in walk.rest:
            ahead.append(self._begin(walk, number, positions))
            if len(ahead) > self.settings.prefetch:
                yield self._done(*ahead.popleft(), walk)
        while ahead:
            yield self._done(*ahead.popleft(), walk)

    def _begin(self, walk: Walk, number: int, positions: Ints) -> tuple[Loaded, list[Future[None]]]:
        paths = {position: walk.path(position) for position in positions.tolist()}
        kept = np.array([position for position, path in paths.items() if path not in self._broken], dtype=np.int64)
        problems = [(path, self._broken[path]) for path in paths.values() if path in self._broken]
        images = [self._images[paths[position]] for position in kept.tolist()]
        numbers = walk.numbers(kept)
        heights, widths = (np.array([image.shape[axis] for image in images], dtype=np.int64) for axis in (0, 1))
        windows = walk.windows(numbers, heights, widths)
        if self.device.type == "cpu":
            out, parts = finish(images, windows, numbers, walk, self._pool())
            return Loaded(out, kept, number, problems), parts
        out = torch.empty(len(kept), *walk.transform.size, 3, dtype=torch.uint8, device=self.device)
        for index, image in enumerate(images):
            out[index] = cut(image, windows[index].tolist(), walk)
        return Loaded(walk.finished(out, numbers), kept, number, problems), []

    def _done(self, loaded: Loaded, parts: list[Future[None]], walk: Walk) -> Loaded:
        for part in parts:
            part.result(self.settings.timeout)
        return loaded

    def close(self) -> None:
        """Let go of the images and threads."""
        self._images.clear()
        self.used = 0
        if self._threads is not None:
            self._threads.close()
            self._threads = None


def _decoded(path: str, side: int) -> Tensor | str:
    """Return a file's pixels with the short side at `side`, uint8, H × W × 3; or the reason why it cannot be read."""
    try:
        image = open_upright(read_bytes(path))
        image.draft(None, (2 * side, 2 * side))
        rgb = to_rgb(image)
        scale = side / min(rgb.size)
        # A strip one pixel wide must not become a picture of a gigabyte.
        size = tuple(min(max(side, round(length * scale)), 8 * side) for length in rgb.size)
        return torch.from_numpy(np.array(rgb.resize((size[0], size[1]), Image.Resampling.BILINEAR)))
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make the decoders raise almost anything
        return reason_of(error)
