"""Checks that several implementations compute the same thing, on the data at hand, before the fastest one is chosen.

Results are compared piece by piece, because a fault usually is in one piece: a tile that is cut wrongly, a channel beyond the last vector.
In the norm of a whole result, one wrong tile of a thousand disappears; in its own block of rows it cannot.

How much two correct results differ: every value that is stored is rounded once, by at most u relative to its size, where u is the unit
roundoff of the activations' dtype (TensorFloat-32's for float32, whose products may be made in it). A residual block stores about eight
values one after another; the roundings of two implementations are independent of each other, and batch-norm's backward pass, which
subtracts what is common to a channel, magnifies them two or three times. √(2 · 8) · u / √3 · 2.5 is about 6 u. `ROUNDINGS` is more than
twice that. A wrong sum, tile or channel is wrong by 1 / √depth of its size or more, which is far above it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Run = Callable[[], object]
# Picks the tensors of a run's result that must agree.
Tensors = Callable[[object], Sequence[Tensor | None]]

ROUNDINGS = 16
# float64 is nobody's training dtype; its sums are long and their order is free.
LARGEST = {
    dtype: ROUNDINGS * unit
    for dtype, unit in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11), (torch.float32, 2.0**-11), (torch.float64, 2.0**-32))
}
# Rows and channels of a piece: the smallest tile that is launched by default.
ROWS, CHANNELS = 64, 64
# One value counts at most this many times what is allowed: a value that rounding carries across the corner of a ReLU has another gradient,
# which is nobody's fault. A piece or a channel may have one in 128 such values.
CAP = 16
# Elements that are compared at a time, in float64: bounds the memory that a comparison takes.
_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Difference:
    """How far a result is from the trusted one at its worst place.

    Attributes:
        size: ‖found − trusted‖ / √(‖trusted‖² + n·r²) of that place with n values, r the root mean square of the whole trusted result, so
            that a place without much in it is not held against rounding; infinite where shapes differ or a number is not finite on one
            side only.
        where: the place, for people.
    """

    size: float
    where: str


def difference(found: Tensor, trusted: Tensor, allowed: float = math.inf) -> Difference:
    """Return the largest difference of any channel, and of any block of `ROWS` rows in `CHANNELS` channels.

    Args:
        found, trusted: (C,), or with their channels on axis 1; every other index is a row.
        allowed: what is going to be allowed: a single value counts at most `CAP` times that, relative to r or its own size.
    """
    if found.shape != trusted.shape:
        return Difference(math.inf, f"its shape {tuple(found.shape)}, not {tuple(trusted.shape)}")
    if not found.numel():
        return Difference(0.0, "nothing")
    ours, theirs = _rows(found), _rows(trusted)
    rows, channels = theirs.shape
    squares = _blocks([truth.square() for truth, _ in _parts(theirs, theirs)])
    typical = squares.sum() / theirs.numel()
    errors = _blocks([_capped(truth, part, typical, CAP * allowed) for truth, part in _parts(theirs, ours)])
    counts = torch.full((len(errors),), float(ROWS), dtype=torch.float64, device=errors.device)
    counts[-1] = rows - ROWS * (len(errors) - 1)
    by_channel = _ratio(errors.sum(0), squares.sum(0), rows * typical)
    wide = _channels(torch.ones(1, channels, dtype=torch.float64, device=errors.device))
    by_piece = _ratio(_channels(errors), _channels(squares), counts[:, None] * wide * typical)
    channel, piece = int(by_channel.argmax()), divmod(int(by_piece.argmax()), by_piece.shape[1])
    worst, worst_piece = float(by_channel[channel]), float(by_piece[piece])
    if not worst_piece > worst:
        return Difference(worst, f"channel {channel}")
    row, column = piece[0] * ROWS, piece[1] * CHANNELS
    last_row, last_column = min(row + ROWS, rows) - 1, min(column + CHANNELS, channels) - 1
    return Difference(worst_piece, f"rows {row} to {last_row}, channels {column} to {last_column}")


def _rows(tensor: Tensor) -> Tensor:
    """Return a matrix with a column per channel; a view for channels-last strides."""
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.movedim(1, -1).reshape(-1, tensor.shape[1])


def _parts(trusted: Tensor, found: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield both in float64, some whole blocks of rows at a time; what is not finite but the same on both sides is zero."""
    step = max(1, _AT_ONCE // (ROWS * trusted.shape[1])) * ROWS
    for first in range(0, len(trusted), step):
        one, other = trusted[first : first + step].double(), found[first : first + step].double()
        same = ((one == other) | (one.isnan() & other.isnan())) & ~one.isfinite()
        yield one.masked_fill(same, 0.0), other.masked_fill(same, 0.0)


def _capped(truth: Tensor, found: Tensor, typical: Tensor, cap: float) -> Tensor:
    """Return the square of every value's error, at most what `difference` lets it count; an error that is not finite stays as it is."""
    errors = (truth - found).square()
    if not math.isfinite(cap):
        return errors
    return torch.where(errors.isfinite(), torch.minimum(errors, cap**2 * (truth.square() + typical)), errors)


def _blocks(parts: Sequence[Tensor]) -> Tensor:
    """Return the sums over blocks of rows, (blocks, C)."""
    return torch.cat([F.pad(part, (0, 0, 0, -len(part) % ROWS)).view(-1, ROWS, part.shape[1]).sum(1) for part in parts])


def _channels(sums: Tensor) -> Tensor:
    """Return the sums over blocks of channels, (rows, blocks)."""
    return F.pad(sums, (0, -sums.shape[1] % CHANNELS)).view(len(sums), -1, CHANNELS).sum(2)


def _ratio(errors: Tensor, squares: Tensor, floor: Tensor) -> Tensor:
    """Return √(errors / (squares + floor)); infinite where that is no number."""
    found = (errors / (squares + floor).clamp_min(1e-300)).sqrt()
    return torch.where(found.isfinite(), found, math.inf)


def agreeing(
    runs: Mapping[str, Run], trusted: Sequence[str], tensors: Tensors, *, until: float = math.inf
) -> tuple[dict[str, Run], dict[str, str]]:
    """Return the runs whose results equal the trusted one's up to rounding, and for each of the others what is wrong with it.

    A run that raises is left out too: a kernel that does not compile, or does not fit into this device, must not stop work that can
    continue without it.

    Args:
        runs: by name; their results must not depend on how often they have run.
        trusted: names of runs that are known to be right; the first that does not raise is what the others are compared with.
        tensors: returns the parts of a result to compare, the same number for every run; None for a part that is absent.
        until: `time.perf_counter()` from which on no further run is tried; those are left out without a reason.

    Raises:
        Exception: the last trusted run's, if all of them raise.
    """
    problems: dict[str, str] = {}
    right, truth = _first_that_runs(runs, trusted, tensors, problems)
    kept: dict[str, Run] = {}
    for name, run in runs.items():
        if name in problems or (name != right and time.perf_counter() >= until):
            continue
        problem = None if name == right else _problem(run, tensors, truth)
        if problem is None:
            kept[name] = run
        else:
            problems[name] = problem
    return kept, problems


def _first_that_runs(
    runs: Mapping[str, Run], names: Sequence[str], tensors: Tensors, problems: dict[str, str]
) -> tuple[str, list[Tensor | None]]:
    for name in names:
        try:
            return name, [None if tensor is None else tensor.clone() for tensor in tensors(runs[name]())]
        except Exception as error:
            if name == names[-1]:
                raise
            problems[name] = failure(error)
    raise ValueError("no run is trusted")


def failure(error: Exception) -> str:
    """Return an error in one line, and give back the memory that the failed attempt holds: others may need it."""
    # The frames refer to everything that was allocated.
    error.__traceback__ = None
    if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available():
        torch.cuda.empty_cache()
    lines = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}: {lines[0] if lines else 'no message'}"


def _problem(run: Run, tensors: Tensors, truth: Sequence[Tensor | None]) -> str | None:
    # Vectors of sums are float32 whatever was summed, so the least exact dtype of the result sets the limit.
    allowed = max((LARGEST.get(tensor.dtype, 0.0) for tensor in truth if tensor is not None), default=0.0)
    try:
        worst = Difference(0.0, "")
        for one, other in zip(tensors(run()), truth, strict=True):
            if (one is None) != (other is None):
                return "returns a gradient where there should be none, or none where there should be one"
            if one is not None and other is not None:
                worst = max(worst, difference(one, other, allowed), key=lambda found: found.size)
    except Exception as error:
        return failure(error)
    if worst.size <= allowed:
        return None
    return (
        f"computes something else (it differs by {worst.size:.1e} in {worst.where}, {allowed:.0e} is allowed): please report this with "
        "`der-fast doctor --json`"
    )
