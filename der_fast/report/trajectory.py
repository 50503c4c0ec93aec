"""Mask logits over the epochs of a step, as saved in RUN/steps/NN/mask_logits.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open


@dataclass(frozen=True)
class MaskTrajectory:
    """The logits e of one step.

    Attributes:
        step: 1-based.
        logits: float32 (rows, channels); the first row is the start, the last one decides: a channel is kept iff e > 0.
        times: float64 (rows,), in epochs. Two rows with the same time are from before and after the cut to the budget.
        offsets: int64 (groups + 1,); group g owns the channels offsets[g]…offsets[g+1]−1.
        groups: the groups' names.
        settled_from: first epoch (1-based) with binary masks; None if there is none.
        prices: float64 (groups,): parameters per convolution that a channel costs, the dearest 1; None if not recorded.
        thresholds: float64 (groups,): what logits had to exceed in the cut to the budget, 0 without one; None if not recorded.
    """

    step: int
    logits: NDArray[np.float32]
    times: NDArray[np.float64]
    offsets: NDArray[np.int64]
    groups: tuple[str, ...]
    settled_from: int | None
    prices: NDArray[np.float64] | None = None
    thresholds: NDArray[np.float64] | None = None

    @property
    def epochs(self) -> float:
        """Number of epochs recorded."""
        return float(self.times[-1])

    @property
    def alive(self) -> NDArray[np.bool_]:
        """Boolean (rows, channels): e > 0."""
        return self.logits > 0

    @property
    def learned(self) -> int:
        """Number of rows before the first cut: only the losses caused what happens in them."""
        same = np.flatnonzero(np.diff(self.times) == 0)
        return int(same[0]) + 1 if len(same) else len(self.times)

    def kinds(self) -> dict[str, NDArray[np.bool_]]:
        """Return channel selections, boolean (channels,), for residual streams and for inner masks; empty kinds are left out."""
        stream = np.zeros(self.logits.shape[1], dtype=np.bool_)
        for group, name in enumerate(self.groups):
            stream[self.offsets[group] : self.offsets[group + 1]] = is_stream(name)
        kinds = {"residual streams": stream, "inner channels": ~stream}
        return {name: chosen for name, chosen in kinds.items() if chosen.any()}

    def alive_share_per_group(self) -> NDArray[np.float64]:
        """Return float64 (groups, rows): the share of every group's channels with e > 0."""
        alive = self.alive
        spans = zip(self.offsets[:-1], self.offsets[1:], strict=True)
        return np.stack([alive[:, start:stop].mean(axis=1) for start, stop in spans])

    def led_from_the_start(self) -> float | None:
        """Return the share of kept channels that already had the highest logits of their groups at the start; None if none is kept.

        Near 1, the losses hardly changed the order: initialisation decided which channels stay, price and budget decided how many.
        """
        kept, led = int(self.alive[-1].sum()), 0
        for start, stop in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            alive = self.alive[-1, start:stop]
            first = np.argsort(-self.logits[0, start:stop], kind="stable")[: int(alive.sum())]
            led += int(alive[first].sum())
        return led / kept if kept else None

    def crossings(self) -> NDArray[np.int64]:
        """Return int64 (channels,): how often each channel changed between kept and dropped while the masks were learned."""
        alive = self.alive[: self.learned]
        changed = alive[1:] != alive[:-1]
        crossings: NDArray[np.int64] = changed.sum(axis=0, dtype=np.int64)
        return crossings


def is_stream(group: str) -> bool:
    """Whether a group masks a residual stream (or the stem): groups inside a block are named ``stage.block``, with a dot."""
    return "." not in group


def read_trajectories(run: Path, settled: Mapping[int, int], missing: list[str]) -> tuple[MaskTrajectory, ...]:
    """Read every step's mask logits; a damaged file is named in `missing` and left out.

    Args:
        run: the run's folder.
        settled: step → first epoch with binary masks.
        missing: receives one sentence for every unusable file.
    """
    trajectories = []
    for file in sorted(run.glob("steps/*/mask_logits.safetensors")):
        if not file.parent.name.isdigit():
            continue
        step = int(file.parent.name)
        try:
            trajectories.append(_read(file, step, settled.get(step)))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            missing.append(f"Mask trajectories of step {step}: {file.relative_to(run)} is damaged ({error}).")
    return tuple(sorted(trajectories, key=lambda trajectory: trajectory.step))


def _read(file: Path, step: int, settled_from: int | None) -> MaskTrajectory:
    with safe_open(file, framework="numpy") as tensors:
        logits, times, offsets = (tensors.get_tensor(name) for name in ("logits", "times", "offsets"))
        metadata, there = tensors.metadata() or {}, set(tensors.keys())
        prices, thresholds = (tensors.get_tensor(name) if name in there else None for name in ("prices", "thresholds"))
    groups = json.loads(metadata["groups"])
    if logits.ndim != 2 or not logits.size or not np.isfinite(logits).all():
        raise ValueError(f"logits of shape {logits.shape} must be (rows, channels) with every value finite")
    if times.shape != (len(logits),) or not np.isfinite(times).all() or (np.diff(times) < 0).any():
        raise ValueError(f"times of shape {times.shape} do not rise with the {len(logits)} rows of logits")
    if not isinstance(groups, list) or offsets.shape != (len(groups) + 1,):
        raise ValueError(f"{len(groups)} groups do not fit offsets of shape {offsets.shape}")
    if offsets[0] != 0 or offsets[-1] != logits.shape[1] or (np.diff(offsets) <= 0).any():
        raise ValueError(f"offsets do not rise from 0 to {logits.shape[1]} channels")
    for name, values in (("prices", prices), ("thresholds", thresholds)):
        if values is not None and (values.shape != (len(groups),) or not np.isfinite(values).all() or (values < 0).any()):
            raise ValueError(f"{name} of shape {values.shape} must be a number of at least 0 for each of {len(groups)} groups")
    return MaskTrajectory(
        step,
        logits.astype(np.float32),
        times.astype(np.float64),
        offsets.astype(np.int64),
        tuple(map(str, groups)),
        settled_from,
        prices,
        thresholds,
    )
