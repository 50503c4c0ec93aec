"""The resident cache: images decoded once, with their short side at the stored size, and cropped from memory ever after."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from der_fast.data.decode import reason_of, to_rgb
from der_fast.data.draws import Ints
from der_fast.data.encoded import open_upright
from der_fast.data.members import read_bytes
from der_fast.data.progress import progress_bar
from der_fast.data.reading import Loaded, ReadSettings, Walk, brightened
from der_fast.data.threads import FileThreads
from der_fast.errors import DataError

# A photo of 4:3, as most are, stands for those that were not decoded yet.
_USUAL_ASPECT = 4 / 3
_PART = 16


class Resident:
    """Holds decoded images on a device within a budget, and reads walks from them; see `Reader`.

    Args:
        settings: `workers`, `prefetch` and `timeout` are used.
        budget: bytes.
        device: where the images are held.
        say: told what became of the cache.
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
        """Make every image of a walk resident if they fit in the budget, and return whether they are."""
        if self._too_many is not None and sum(map(len, walk.batches)) >= self._too_many:
            return False
        wanted = {walk.path(position) for batch in walk.batches for position in batch.tolist()}
        missing = sorted(wanted - self._images.keys() - self._broken.keys())
        side = walk.transform.stored_size[0]
        # By what is wanted and not by what is there already: a run that was interrupted shall read from where it read before.
        fits = len(wanted) * 3 * side * side * _USUAL_ASPECT <= self.budget
        if fits and not missing:
            return True
        if self.used + len(missing) * 3 * side * side * _USUAL_ASPECT > self.budget:
            self._forget_others(wanted)
        if not fits or not self._fill(missing, side, wanted):
            self._too_many = len(wanted)
            self._forget_others(set())
            self.say(
                f"resident cache: {len(wanted):,} images do not fit in {self.budget / 2**30:.3g} GiB, so they are decoded anew every time"
            )
            return False
        self.say(f"resident cache: {len(self._images):,} images decoded once, {self.used / 2**30:.3g} of {self.budget / 2**30:.3g} GiB")
        return True

    def _forget_others(self, wanted: set[str]) -> None:
        for path in [path for path in self._images if path not in wanted]:
            self.used -= self._images.pop(path).numel()

    def _fill(self, paths: list[str], side: int, wanted: set[str]) -> bool:
        """Decode files; returns False, leaving it there, as soon as what is wanted is more than the budget allows."""
        with progress_bar("decoding into the resident cache", len(paths)) as advance:
            for start in range(0, len(paths), 64 * _PART):
                chunk = paths[start : start + 64 * _PART]
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
        mirrored, factors, rows = walk.flips(numbers, len(kept)), walk.factors(numbers, len(kept)), _rows(walk)
        on_cpu = self.device.type == "cpu"
        out = torch.empty(len(kept), *walk.transform.size, 3, dtype=walk.dtype if on_cpu else torch.uint8, device=self.device)

        def work(start: int) -> None:
            for index in range(start, min(start + _PART, len(images))):
                pixels = cut(images[index], windows[index].tolist(), walk)
                if on_cpu:
                    finish_into(out[index], pixels, bool(mirrored[index]), float(factors[index]), rows)
                else:
                    out[index] = pixels

        if not on_cpu:
            for start in range(0, len(images), _PART):
                work(start)
            return Loaded(walk.finished(out, numbers), kept, number, problems), []
        return Loaded(out, kept, number, problems), [self._pool().submit(work, start) for start in range(0, len(images), _PART)]

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
        # A strip of one pixel's width shall not become a picture of a gigabyte.
        size = tuple(min(max(side, round(length * scale)), 8 * side) for length in rgb.size)
        return torch.from_numpy(np.array(rgb.resize((size[0], size[1]), Image.Resampling.BILINEAR)))
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make the decoders raise almost anything
        return reason_of(error)


def cut(image: Tensor, window: list[int], walk: Walk) -> Tensor:
    """Resize a window of a decoded image and cut off what an evaluation's centre crop leaves out: uint8, H × W × 3."""
    top, left, height, width = window
    crop = image[top : top + height, left : left + width]
    if (height, width) != walk.resized:
        # In exactly this order of strides it is taken for channels-last, for which there is the fast path.
        planes = crop.contiguous()[None].permute(0, 3, 1, 2)
        # PyTorch's fast antialiased resize of uint8 exists on the CPU only.
        if image.device.type == "cpu":
            planes = F.interpolate(planes, size=walk.resized, mode="bilinear", antialias=True, align_corners=False)
        else:
            planes = F.interpolate(planes.float(), size=walk.resized, mode="bilinear", antialias=True, align_corners=False)
            planes = planes.round_().clamp_(0, 255).to(torch.uint8)
        crop = planes[0].permute(1, 2, 0)
    rows, columns = walk.transform.size
    top, left = (crop.shape[0] - rows) // 2, (crop.shape[1] - columns) // 2
    return crop[top : top + rows, left : left + columns]


def finish_into(out: Tensor, pixels: Tensor, mirrored: bool, factor: float, rows: tuple[Tensor, Tensor] | None) -> None:
    """Mirror, jitter and normalise one image while it is in the processor's cache.

    Args:
        out: H × W × 3; written to.
        pixels: uint8, H × W × 3.
        mirrored: whether to mirror.
        factor: of brightness; 1 does nothing.
        rows: scale and shift of a row of W × 3 numbers, float32: three at a time would use a fraction of a vector register. None stays
            with whole grey levels.
    """
    if mirrored:
        pixels = pixels.flip(1)
    if rows is None:
        out.copy_(pixels if factor == 1.0 else brightened(pixels, factor))
        return
    scale, shift = rows
    values = pixels.reshape(len(pixels), len(scale)).float()
    if factor != 1.0:
        values.mul_(factor).clamp_(0, 255)
    flat = out.view(values.shape)
    if flat.dtype == torch.float32:
        torch.addcmul(shift, values, scale, out=flat)
    else:
        flat.copy_(torch.addcmul(shift, values, scale))


def _rows(walk: Walk) -> tuple[Tensor, Tensor] | None:
    if walk.dtype == torch.uint8:
        return None
    mean, std = torch.tensor(walk.transform.mean), torch.tensor(walk.transform.std)
    width = walk.transform.size[1]
    return (1 / (255 * std)).repeat(width), (-mean / std).repeat(width)
