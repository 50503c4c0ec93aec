"""A reader on DALI pipelines that outlive the lists they read: every batch is fed in, so a new list needs no new pipeline.

der_fast's threads read the files ahead; one thread per walk drives the pipeline, so that waiting for a batch can time out.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from der_fast.data.augment.draws import Ints
from der_fast.data.decode.encoded import Encoded, read_encoded
from der_fast.data.decode.pixels import reason_of
from der_fast.data.io.threads import FileThreads
from der_fast.data.read.dali.pipeline import Form, build, count_of
from der_fast.data.read.finishing import finish
from der_fast.data.read.walk import Loaded, ReadSettings, Walk
from der_fast.errors import DataError

_MOST_PIPELINES = 3
_PATIENCE = 5.0
# Files that one thread reads at a time.
_PART = 32
_LEFT: list[object] = []


@dataclass
class Prepared:
    """A batch before decoding, or a part of one: its number in the pass, what was read, and what could not be."""

    number: int
    positions: Ints
    images: list[Encoded]
    problems: list[tuple[str, str]]

    @property
    def count(self) -> int:
        """How many images there are to decode."""
        return len(self.images)

    def one(self, index: int) -> Prepared:
        """Return a batch of only this image."""
        return Prepared(self.number, self.positions[index : index + 1], [self.images[index]], [])


@dataclass
class Feed:
    """The input of a pipeline, which keeps calling the same object, whatever is read.

    Attributes:
        walk: what is read.
        timeout: seconds to wait for a batch's files.
        reading: batches whose files are being read, in parts.
        fed: batches that the pipeline has taken and not returned yet.
        again: batches that a failed pipeline had; they come first.
        stopped: nothing more should be fed.
    """

    walk: Walk | None = None
    timeout: float = 0.0
    reading: Iterator[list[Future[Prepared]]] = field(default_factory=lambda: iter(()))
    fed: deque[Prepared] = field(default_factory=deque)
    again: deque[Prepared] = field(default_factory=deque)
    stopped: bool = False

    def begin(self, walk: Walk, timeout: float, reading: Iterator[list[Future[Prepared]]]) -> None:
        """Feed a walk from now on; the rest of any other walk is dropped."""
        self.walk, self.timeout, self.reading, self.stopped = walk, timeout, reading, False
        self.fed.clear()
        self.again.clear()

    def end(self) -> None:
        """Let go of the walk."""
        self.reading = iter(())
        self.fed.clear()
        self.again.clear()

    def __call__(self) -> tuple[Any, ...]:
        """Return the next batch's inputs; raises StopIteration at the end."""
        if self.stopped:
            raise StopIteration
        batch = self._next()
        while not batch.count:
            # A pipeline does not accept an empty batch; its problems go with the next one.
            try:
                following = self._next()
            except StopIteration:
                self.fed.append(batch)
                raise
            batch = Prepared(following.number, following.positions, following.images, batch.problems + following.problems)
        self.fed.append(batch)
        assert self.walk is not None
        return inputs_of(self.walk, batch)

    def _next(self) -> Prepared:
        if self.again:
            return self.again.popleft()
        parts = [part.result(self.timeout) for part in next(self.reading)]
        return Prepared(
            parts[0].number,
            np.concatenate([part.positions for part in parts]),
            [image for part in parts for image in part.images],
            [problem for part in parts for problem in part.problems],
        )


def inputs_of(walk: Walk, batch: Prepared) -> tuple[Any, ...]:
    """Return a batch as the pipeline takes it."""
    numbers = walk.numbers(batch.positions)
    heights = np.array([image.height for image in batch.images], dtype=np.int64)
    widths = np.array([image.width for image in batch.images], dtype=np.int64)
    windows = walk.windows(numbers, heights, widths).astype(np.int32)
    inputs: tuple[Any, ...] = (
        [np.frombuffer(image.data, dtype=np.uint8) for image in batch.images],
        np.ascontiguousarray(windows[:, :2]),
        np.ascontiguousarray(windows[:, 2:]),
        walk.flips(numbers, batch.count).astype(np.int32),
    )
    inputs = (*inputs, walk.factors(numbers, batch.count).astype(np.float32))
    return inputs[: count_of(walk.jitters, walk.device.type == "cuda")]


class Probe:
    """Tries images one at a time.

    Args:
        form: the failed pipeline's.
        settings: the reader's.
    """

    def __init__(self, form: Form, settings: ReadSettings) -> None:
        self.form, self.settings = replace(form, batch_size=1), replace(settings, prefetch=1, workers=1)
        self._waiting: deque[Any] = deque()
        self._pipeline: Pipeline | None = None

    def _next(self) -> Any:
        return self._waiting.popleft()

    def decodes(self, inputs: tuple[Any, ...]) -> bool:
        """Whether a batch of one image decodes."""
        if self._pipeline is None:
            self._pipeline = build(self.form, self.settings, self._next)
        self._waiting.append(inputs)
        try:
            self._pipeline.run()
        except RuntimeError:
            # A pipeline that failed once cannot be used again.
            self._pipeline = None
            return False
        return True


class DaliReader:
    """Reads with DALI; see `Reader`. A file that its decoder refuses is tried with Pillow.

    Args:
        settings: see `ReadSettings`.
    """

    name = "dali"

    def __init__(self, settings: ReadSettings) -> None:
        self.settings = settings
        self._refused: set[str] = set()
        self._begin()

    def _begin(self) -> None:
        self._owner = os.getpid()
        self._idle: dict[Form, list[tuple[Pipeline, Feed]]] = {}
        self._files: FileThreads | None = None
        self._finishers: FileThreads | None = None
        self._lock = threading.Lock()

    def read(self, walk: Walk) -> Iterator[Loaded]:
        """Yield the batches of a walk in order; see `Reader.read`."""
        if self._owner != os.getpid():
            # In a forked process pipelines have lost their threads, and freeing them would wait for those.
            _LEFT.append(self._idle)
            self._begin()
        results: queue.Queue[Loaded | BaseException | None] = queue.Queue(maxsize=max(self.settings.prefetch, 1))
        stop = threading.Event()
        driver = threading.Thread(target=self._drive, args=(walk, results, stop), name="der_fast-dali", daemon=True)
        driver.start()
        try:
            while True:
                try:
                    item = results.get(timeout=self.settings.timeout)
                except queue.Empty:
                    raise DataError(
                        f"no batch of images came within data.timeout={self.settings.timeout:g} seconds; check the drive that holds "
                        f"{walk.table.roots[0]}, or raise data.timeout"
                    ) from None
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            with contextlib.suppress(queue.Empty):
                while True:
                    results.get_nowait()
            driver.join(_PATIENCE)

    def close(self) -> None:
        """Let go of pipelines and threads."""
        with self._lock:
            self._idle.clear()
            for threads in (self._files, self._finishers):
                if threads is not None:
                    threads.close()
            self._files = self._finishers = None

    def _drive(self, walk: Walk, results: queue.Queue[Any], stop: threading.Event) -> None:
        """Run the pipeline over a walk and put every batch into `results`, then None, or what went wrong."""
        try:
            for loaded in self._batches(walk, stop):
                _put(results, loaded, stop)
            _put(results, None, stop)
        except FutureTimeout:
            _put(results, DataError(f"reading files took longer than data.timeout={self.settings.timeout:g} seconds"), stop)
        except BaseException as error:  # raised again where the batch is awaited
            _put(results, error, stop)

    def _batches(self, walk: Walk, stop: threading.Event) -> Iterator[Loaded]:
        form = self._form(walk)
        pipeline, feed = self._take(form)
        feed.begin(walk, self.settings.timeout, self._ahead(walk))
        while True:
            try:
                (output,) = pipeline.run()
            except StopIteration:
                break
            except RuntimeError as error:
                self._sort_out(form, feed, error)
                pipeline = build(form, self.settings, feed)
                continue
            batch = feed.fed.popleft()
            if not stop.is_set():
                yield Loaded(self._images(output, walk, batch), batch.positions, batch.number, batch.problems)
            feed.stopped = stop.is_set()
        # The rest are batches without a single readable file.
        for batch in feed.fed:
            yield Loaded(torch.zeros(0, *walk.transform.size, 3, dtype=walk.dtype), batch.positions, batch.number, batch.problems)
        feed.end()
        pipeline.reset()
        # From here on another walk may use them.
        self._give_back(form, pipeline, feed)

    def _images(self, output: Any, walk: Walk, batch: Prepared) -> Tensor:
        """Return a pipeline's output for a batch, finished."""
        if walk.device.type == "cuda":
            # No copy: the pipeline keeps this memory for as long as the tensor lives.
            return torch.utils.dlpack.from_dlpack(output.as_tensor()).to(walk.dtype)
        crops = [torch.utils.dlpack.from_dlpack(output[index]) for index in range(batch.count)]
        whole = np.array([[0, 0, *crop.shape[:2]] for crop in crops], dtype=np.int64)
        with self._lock:
            threads = self._finishers = self._finishers or FileThreads(max(self.settings.workers, 1), "der_fast-finish")
        images, parts = finish(crops, whole, walk.numbers(batch.positions), walk, threads)
        # Before the pipeline runs again and overwrites its output.
        for part in parts:
            part.result(self.settings.timeout)
        return images

    def _form(self, walk: Walk) -> Form:
        transform = walk.transform
        on_gpu = (walk.device.index or 0) if walk.device.type == "cuda" else None
        return Form(walk.batch_size, walk.resized, transform.size, transform.mean, transform.std, walk.jitters, walk.dtype, on_gpu)

    def _take(self, form: Form) -> tuple[Pipeline, Feed]:
        """Return an idle pipeline, or a new one: two walks at a time need two."""
        with self._lock:
            if waiting := self._idle.get(form):
                return waiting.pop()
        feed = Feed()
        return build(form, self.settings, feed), feed

    def _give_back(self, form: Form, pipeline: Pipeline, feed: Feed) -> None:
        with self._lock:
            rest = self._idle.pop(form, [])
            self._idle[form] = [(pipeline, feed), *rest][:1]
            while len(self._idle) > _MOST_PIPELINES:
                self._idle.pop(next(iter(self._idle)))

    def _ahead(self, walk: Walk) -> Iterator[list[Future[Prepared]]]:
        """Yield every batch as futures of its parts, which are read some batches ahead."""
        with self._lock:
            files = self._files = self._files or FileThreads(max(self.settings.workers, 1), "der_fast-files")
        ahead: deque[list[Future[Prepared]]] = deque()
        for number, positions in walk.rest:
            parts = np.array_split(positions, -(-len(positions) // _PART))
            ahead.append([files.submit(self._prepare, walk, number, part) for part in parts])
            if len(ahead) > self.settings.prefetch:
                yield ahead.popleft()
        yield from ahead

    def _prepare(self, walk: Walk, number: int, positions: Ints) -> Prepared:
        kept, images, problems = [], [], []
        for position in positions.tolist():
            path = walk.path(position)
            try:
                images.append(read_encoded(path, plainly=path not in self._refused))
            except MemoryError:
                raise
            except Exception as error:  # damaged bytes make the decoders raise almost anything
                problems.append((path, reason_of(error)))
            else:
                kept.append(position)
        return Prepared(number, np.array(kept, dtype=np.int64), images, problems)

    def _sort_out(self, form: Form, feed: Feed, error: RuntimeError) -> None:
        """Find out which images a pipeline failed on, and queue everything that it was fed again, without them.

        Raises:
            DataError: it failed for another reason.
        """
        assert feed.walk is not None
        fed, feed.fed, found = list(feed.fed), deque(), False
        probe = Probe(form, self.settings)
        for batch in fed:
            refused = [index for index in range(batch.count) if not probe.decodes(inputs_of(feed.walk, batch.one(index)))]
            found = found or bool(refused)
            if len(refused) == batch.count > _PART:
                # So many files cannot all be damaged: something else is wrong.
                raise DataError(_failed(error)) from error
            feed.again.append(self._without(feed.walk, batch, refused) if refused else batch)
        if not found:
            raise DataError(_failed(error)) from error

    def _without(self, walk: Walk, batch: Prepared, refused: list[int]) -> Prepared:
        """Decode with Pillow what DALI refused; what Pillow refuses too is a problem."""
        self._refused.update(walk.path(int(batch.positions[index])) for index in refused)
        again = self._prepare(walk, batch.number, batch.positions[refused])
        replaced = dict(zip(again.positions.tolist(), again.images, strict=True))
        images = dict(zip(batch.positions.tolist(), batch.images, strict=True))
        lost = {int(batch.positions[index]) for index in refused} - set(replaced)
        images.update(replaced)
        kept = [position for position in batch.positions.tolist() if position not in lost]
        return Prepared(
            batch.number, np.array(kept, dtype=np.int64), [images[position] for position in kept], batch.problems + again.problems
        )


def _failed(error: RuntimeError) -> str:
    return f"nvidia-dali failed: {' '.join(str(error).split())}; try data.reader='pillow'"


def _put(results: queue.Queue[Any], item: Any, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            results.put(item, timeout=0.1)
        except queue.Full:
            continue
        return
