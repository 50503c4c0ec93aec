"""What each program of an interpreted Triton kernel reads and writes, and whether results depend on the order in which programs run.

`disturbed(run)` calls `run` twice, with programs in the interpreter's order and in another; torch.empty returns NaN meanwhile, or an
integer type's largest number. It returns the launches and everything that is wrong:

- two programs of a launch write the same byte, or one reads what another writes: on a GPU they run at the same time, in any order;
- one program reads what it wrote itself without `tl.debug_barrier` in between, or one store writes a place twice: its threads race;
- memory outside the arguments is touched (what is outside is not accessed then);
- a tensor that a launch writes to has elements that no program wrote;
- the results differ between the two orders, or hold NaN.

All of Triton's memory operations end in four functions of its module `_interpreter`, tensor descriptors included; those are replaced.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

SEED = 0
NOBODY = np.iinfo(np.int32).max


class _Programs:
    """For each byte, the lowest and the highest number of the programs that were here."""

    def __init__(self, size: int) -> None:
        self.low, self.high = np.full(size, NOBODY, np.int32), np.full(size, -1, np.int32)

    def add(self, where: np.ndarray, program: int) -> None:
        self.low[where] = np.minimum(self.low[where], program)
        self.high[where] = np.maximum(self.high[where], program)


@dataclass
class _Argument:
    name: str
    tensor: Tensor
    begin: int
    end: int

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> _Argument:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return cls(name, tensor, tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size())

    def addresses(self) -> np.ndarray:
        """Every byte of its elements, without gaps between them."""
        size = self.tensor.element_size()
        places = torch.arange((self.end - self.begin) // size).as_strided(self.tensor.shape, self.tensor.stride()).numpy().reshape(-1)
        return (places[:, None] * size + np.arange(size)).reshape(-1)


class _Stretch:
    """A piece of memory without gaps that one argument covers, or several that overlap."""

    def __init__(self, arguments: Sequence[_Argument]) -> None:
        self.arguments = arguments
        self.begin, self.end = min(a.begin for a in arguments), max(a.end for a in arguments)
        size = self.end - self.begin
        self.read, self.written = _Programs(size), _Programs(size)
        # When it was last written: what is read in the same period has not been waited for.
        self.period = np.full(size, -1, np.int64)

    def name(self, byte: int) -> str:
        address = self.begin + int(byte)
        found = next(a for a in self.arguments if a.begin <= address < a.end)
        return f"{found.name}[{(address - found.begin) // found.tensor.element_size()}]"


@dataclass
class Launch:
    """One launch: `kernel` as module.function, the number of its programs, and what is wrong with it in sentences.

    `shared` is what programs do to each other, which may be declared as meant; `faults` never are.
    """

    kernel: str
    programs: int = 0
    shared: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class Recorder:
    """Stands in for the interpreter's memory functions and for its loop over programs."""

    def __init__(self, shuffle: bool) -> None:
        self.launches: list[Launch] = []
        self._shuffle = shuffle
        self._draw = np.random.default_rng(SEED)
        self._memory = interpreter._interpreter
        self._stretches: list[_Stretch] = []
        self._grid: tuple[int, int, int] = (1, 1, 1)
        self._order = np.zeros(1, np.int64)
        self._program = self._period = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    @contextlib.contextmanager
    def launch(self, function: Callable[..., object], arguments: dict[str, object]) -> Iterator[None]:
        self.launches.append(Launch(f"{function.__module__}.{function.__name__}"))
        self._stretches = _stretches([_Argument.of(*named) for item in arguments.items() for named in _tensors(*item)])
        yield
        self._judge(self.launches[-1])

    def set_grid_dim(self, x: int, y: int, z: int) -> None:
        self._grid = (x, y, z)
        self.launches[-1].programs = count = x * y * z
        self._order = np.arange(count)
        if self._shuffle and count > 1:
            while (self._order == np.arange(count)).all():
                self._order = self._draw.permutation(count)

    def begin(self, x: int, y: int, z: int) -> tuple[int, ...]:
        """Return the program that runs where the interpreter meant this one to."""
        self._program = int(self._order[np.ravel_multi_index((x, y, z), self._grid)])
        self.barrier()
        return self._place(self._program)

    def barrier(self) -> None:
        self._period += 1

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: np.dtype) -> np.ndarray:
        mask = self._touch("reads", pointers, mask, dtype.itemsize, self._note_load)
        return self._memory.load(pointers, mask, other, dtype)

    def store(self, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray) -> None:
        mask = self._touch("writes", pointers, mask, value.dtype.itemsize, self._note_store)
        self._memory.store(pointers, value, mask)

    def atomic_rmw(self, operation: object, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray, order: object) -> np.ndarray:
        mask = self._touch("changes", pointers, mask, value.dtype.itemsize, self._note_atomic)
        return self._memory.atomic_rmw(operation, pointers, value, mask, order)

    def atomic_cas(self, pointers: np.ndarray, expected: np.ndarray, value: np.ndarray, order: object) -> np.ndarray:
        inside = self._touch("changes", pointers, np.ones(pointers.shape, bool), value.dtype.itemsize, self._note_atomic)
        return self._memory.atomic_cas(pointers, expected, value, order) if inside.all() else expected

    def _touch(self, verb: str, pointers: np.ndarray, mask: np.ndarray, size: int, note: Callable[..., None]) -> np.ndarray:
        """Note what is accessed and return the mask without what lies outside of all arguments."""
        pointers, mask = np.broadcast_arrays(pointers, mask)
        addresses = pointers.astype(np.int64)
        outside = mask.copy()
        for stretch in self._stretches:
            if not outside.any():
                return mask
            here = outside & (addresses >= stretch.begin) & (addresses + size <= stretch.end)
            if here.any():
                outside &= ~here
                note(stretch, addresses[here] - stretch.begin, range(size))
        if not outside.any():
            return mask
        self._fault(f"{verb} memory outside its arguments ({int(outside.sum())} elements)")
        return mask & ~outside

    def _note_load(self, stretch: _Stretch, where: np.ndarray, size: range) -> None:
        for byte in size:
            stretch.read.add(where + byte, self._program)
        own = where[stretch.period[where] == self._period]
        if len(own):
            self._fault(f"reads {stretch.name(own[0])}, which it wrote itself, with no barrier in between")

    def _note_store(self, stretch: _Stretch, where: np.ndarray, size: range) -> None:
        if len(np.unique(where)) < len(where):
            self._fault(f"writes an element of {stretch.name(where[0]).partition('[')[0]} twice in one store")
        for byte in size:
            stretch.written.add(where + byte, self._program)
            stretch.period[where + byte] = self._period

    def _note_atomic(self, stretch: _Stretch, where: np.ndarray, size: range) -> None:
        for byte in size:
            stretch.read.add(where + byte, self._program)
            stretch.written.add(where + byte, self._program)

    def _fault(self, text: str) -> None:
        self.launches[-1].faults.append(f"program {self._place(self._program)} {text}")

    def _place(self, program: int) -> tuple[int, ...]:
        return tuple(int(axis) for axis in np.unravel_index(program, self._grid))

    def _judge(self, launch: Launch) -> None:
        for stretch in self._stretches:
            read, written = stretch.read, stretch.written
            several = written.low < written.high
            if several.any():
                byte = several.argmax()
                pair = f"{self._place(written.low[byte])} and {self._place(written.high[byte])}"
                launch.shared.append(f"programs {pair} both write {stretch.name(byte)}")
            others = (written.high >= 0) & (read.high >= 0) & ((read.low != written.high) | (read.high != written.high))
            if others.any():
                byte = others.argmax()
                writer = written.high[byte]
                reader = read.low[byte] if read.low[byte] != writer else read.high[byte]
                text = f"program {self._place(reader)} reads {stretch.name(byte)}, which {self._place(writer)} writes"
                launch.shared.append(text)
            for argument in stretch.arguments:
                bytes_of = argument.addresses() + argument.begin - stretch.begin
                missing = bytes_of[written.high[bytes_of] < 0]
                if 0 < len(missing) < len(bytes_of):
                    launch.faults.append(f"no program writes {stretch.name(missing[0])}, though others of its elements are written")


def _tensors(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.numel():
            yield name, value
    elif isinstance(value, TensorDescriptor):
        yield from _tensors(name, value.base)


def _stretches(arguments: Sequence[_Argument]) -> list[_Stretch]:
    groups: list[list[_Argument]] = []
    end = -1
    for argument in sorted(arguments, key=lambda a: a.begin):
        if argument.begin < end:
            groups[-1].append(argument)
        else:
            groups.append([argument])
        end = max(end, argument.end)
    return [_Stretch(group) for group in groups]


@contextlib.contextmanager
def recorded(shuffle: bool) -> Iterator[list[Launch]]:
    """Yield the list of launches that end inside. With `shuffle` their programs run in an order drawn at random, never the usual one."""
    recorder = Recorder(shuffle)
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    call, place_at, dimensions, barrier = executor.__call__, builder.set_grid_idx, builder.set_grid_dim, builder.create_barrier

    def launch(self: Any, *positional: object, **named: object) -> None:
        arguments = dict(zip(inspect.signature(self.fn).parameters, positional, strict=False)) | named
        with recorder.launch(self.fn, arguments):
            call(self, *positional, **named)

    def set_grid_dim(*grid: int) -> None:
        recorder.set_grid_dim(*grid)
        dimensions(*grid)

    def create_barrier() -> None:
        recorder.barrier()
        barrier()

    with contextlib.ExitStack() as replaced:
        for owner, name, value in (
            (interpreter, "_interpreter", recorder),
            (executor, "__call__", launch),
            (builder, "set_grid_dim", set_grid_dim),
            (builder, "set_grid_idx", lambda *place: place_at(*recorder.begin(*place))),
            (builder, "create_barrier", create_barrier),
        ):
            replaced.enter_context(mock.patch.object(owner, name, value))
        yield recorder.launches


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def disturbed(run: Callable[[], Sequence[Tensor | None]], meant: Sequence[str] = ()) -> tuple[list[Launch], list[str]]:
    """Return the launches of `run`, which returns its results, and what is wrong with them.

    The kernels in `meant` may write to the same place in several programs.
    """
    with poisoned():
        with recorded(shuffle=False):
            usual = run()
        with recorded(shuffle=True) as launches:
            found = run()
    wrong = []
    for launch in launches:
        texts = launch.faults if launch.kernel in meant else launch.shared + launch.faults
        wrong += [f"{launch.kernel}: {text}" for text in dict.fromkeys(texts)]
    for number, (one, other) in enumerate(zip(usual, found, strict=True)):
        if one is None or other is None:
            assert one is other
            continue
        if one.is_floating_point() and bool(other.isnan().any()):
            wrong.append(f"result {number} holds NaN")
        if not _same_bits(one, other):
            wrong.append(f"result {number} depends on the order of programs")
    return launches, wrong


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(*(v.detach().contiguous().reshape(-1).view(torch.uint8) for v in (one, other)))
