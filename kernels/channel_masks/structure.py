"""The structure behind a network's masks: which channels form a group, and which groups every convolution reads and writes.

The sparsity loss needs it in two forms: as dense 0/1 matrices for the reference, and as small integer tables for the kernels, where every
sum has a fixed order:

    row          up to 128 channels of one group, which one warp handles
    sides        2L numbers: what convolution l reads (the image's channels included), then what it writes
    users        for every group the sides that lie across from it, which are its slope: ∂L_S/∂m = Σ_users K·side / Σ K·c_in·c_out
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

ROW = 128
TABLES = ("rows", "row_offsets", "convs", "user_offsets", "users")


@dataclass(frozen=True)
class ConvolutionGroups:
    """The groups that a convolution reads and writes; all that the sparsity loss needs to know of it.

    Attributes:
        reads: numbers of the groups it reads, side by side; empty for the image.
        writes: numbers of the groups it writes.
        image: channels of the image that it reads; 0 where it reads groups.
        area: kernel height × width.
    """

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    image: int
    area: int


@dataclass(frozen=True)
class MaskStructure:
    """Groups and convolutions of one network with their tables on one device; made by `MaskStructure.of`.

    Attributes:
        widths: channels of every group; group after group they make the mask vector of C entries.
        convolutions: the network's L convolutions.
        full: Σ_l K_l·c_in(l)·c_out(l), the parameter count of which the loss is a fraction.
        span: the most groups that a convolution reads or writes.
        rows: int32 (R, 3): first channel, one past the last channel, group.
        row_offsets: int32 (G + 1): rows of every group.
        convs: int32 (L, 2 + 2·span): image, area, groups read, groups written; padded with -1.
        user_offsets: int32 (G + 1): users of every group.
        users: int32: positions in `sides`.
    """

    widths: tuple[int, ...]
    convolutions: tuple[ConvolutionGroups, ...]
    full: int
    span: int
    rows: Tensor
    row_offsets: Tensor
    convs: Tensor
    user_offsets: Tensor
    users: Tensor
    _terms: dict[torch.dtype, dict[str, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def of(widths: Sequence[int], convolutions: Sequence[ConvolutionGroups], device: torch.device | str = "cpu") -> MaskStructure:
        """Build the tables.

        Args:
            widths: channels of every group, ≥ 0.
            convolutions: at least one.
            device: where to put the tables.

        Raises:
            ValueError: a group does not exist or appears twice in a convolution, or the network has no parameters.
        """
        widths, convolutions = tuple(widths), tuple(convolutions)
        _check(widths, convolutions)
        rows, row_offsets, start = [], [0], 0
        for group, width in enumerate(widths):
            rows += [(first, min(first + ROW, start + width), group) for first in range(start, start + width, ROW)]
            row_offsets.append(len(rows))
            start += width
        span = max(1, *(max(len(conv.reads), len(conv.writes)) for conv in convolutions))
        convs, full = [], 0
        users: list[list[int]] = [[] for _ in widths]
        for number, conv in enumerate(convolutions):
            convs.append([conv.image, conv.area, *_filled(conv.reads, span), *_filled(conv.writes, span)])
            full += conv.area * (conv.image + sum(widths[g] for g in conv.reads)) * sum(widths[g] for g in conv.writes)
            for group in conv.reads:
                users[group].append(len(convolutions) + number)
            for group in conv.writes:
                users[group].append(number)
        if full == 0:
            raise ValueError("the network has no parameters: the sparsity loss, a fraction of them, is not defined")
        user_offsets = [0]
        for own in users:
            user_offsets.append(user_offsets[-1] + len(own))

        def table(values: Sequence[object], columns: int | None = None) -> Tensor:
            made = torch.tensor(values, dtype=torch.int32)
            return (made if columns is None else made.reshape(-1, columns)).to(device)

        return MaskStructure(
            widths,
            convolutions,
            full,
            span,
            rows=table(rows, 3),
            row_offsets=table(row_offsets),
            convs=table(convs),
            user_offsets=table(user_offsets),
            users=table([user for own in users for user in own]),
        )

    @property
    def channels(self) -> int:
        """C, the length of the mask vector."""
        return sum(self.widths)

    @property
    def device(self) -> torch.device:
        """The device that holds the tables."""
        return self.rows.device

    def to(self, device: torch.device | str) -> MaskStructure:
        """Return the structure with its tables on `device`."""
        return replace(self, **{name: getattr(self, name).to(device) for name in TABLES}, _terms={})

    def terms(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the keyword arguments of `sparsity_loss_reference`: 0/1 matrices of `dtype` on the structure's device; cached."""
        if dtype not in self._terms:
            groups = range(len(self.widths))
            membership = torch.repeat_interleave(torch.eye(len(self.widths)), torch.tensor(self.widths, dtype=torch.int64), dim=1)
            values = {
                "membership": membership,
                "reads": torch.tensor([[float(group in conv.reads) for group in groups] for conv in self.convolutions]),
                "writes": torch.tensor([[float(group in conv.writes) for group in groups] for conv in self.convolutions]),
                "image": torch.tensor([float(conv.image) for conv in self.convolutions]),
                "area": torch.tensor([float(conv.area) for conv in self.convolutions]),
            }
            self._terms[dtype] = {name: value.to(device=self.device, dtype=dtype) for name, value in values.items()}
        return self._terms[dtype]


def _check(widths: tuple[int, ...], convolutions: tuple[ConvolutionGroups, ...]) -> None:
    if not widths or not convolutions:
        raise ValueError(f"a network needs groups and convolutions; got {len(widths)} and {len(convolutions)}")
    if min(widths) < 0:
        raise ValueError(f"widths must be ≥ 0; group {widths.index(min(widths))} has {min(widths)}")
    for number, conv in enumerate(convolutions):
        for name, groups in (("reads", conv.reads), ("writes", conv.writes)):
            if len(set(groups)) != len(groups) or any(not 0 <= group < len(widths) for group in groups):
                raise ValueError(f"convolution {number} {name} groups {groups}: they must be distinct and lie in 0 … {len(widths) - 1}")
        if conv.image < 0 or conv.area < 1:
            raise ValueError(f"convolution {number} needs image ≥ 0 and area ≥ 1, not {conv.image} and {conv.area}")


def _filled(groups: tuple[int, ...], span: int) -> list[int]:
    return [*groups, *[-1] * (span - len(groups))]
