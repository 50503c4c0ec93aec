"""Where each channel group lies in the network's one flat mask vector."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from der_fast.kernels.channel_masks import ConvolutionGroups, MaskStructure
from der_fast.model.architecture import IMAGE_CHANNELS, Architecture, Groups


@dataclass(frozen=True)
class MaskLayout:
    """Offsets of the groups of `architecture` in a vector of `channels` entries."""

    architecture: Architecture

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Group names in order."""
        return tuple(self.architecture.groups)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """G + 1 offsets; group g is ``offsets[g]:offsets[g + 1]``."""
        offsets = [0]
        for width in self.architecture.groups.values():
            offsets.append(offsets[-1] + width)
        return tuple(offsets)

    @property
    def channels(self) -> int:
        """Length of the mask vector."""
        return self.offsets[-1]

    def slice_of(self, groups: Groups) -> slice:
        """The slice of the mask vector that belongs to a tensor made of `groups`, which lie side by side."""
        names = self.names
        first, last = names.index(groups[0]), names.index(groups[-1])
        if names[first : last + 1] != groups:
            raise ValueError(f"groups {groups} of {self.architecture.name} do not lie side by side in {names}")
        return slice(self.offsets[first], self.offsets[last + 1])

    def by_group(self, vector: Tensor) -> dict[str, Tensor]:
        """Split a (C,) vector into its groups."""
        offsets = self.offsets
        return {name: vector[offsets[i] : offsets[i + 1]] for i, name in enumerate(self.names)}

    def widths(self, keep: Tensor) -> dict[str, int]:
        """Number of kept channels of every group; `keep` is a (C,) boolean vector."""
        return {name: int(part.sum()) for name, part in self.by_group(keep).items()}

    def kept_parameters(self, keep: Tensor) -> int:
        """Parameters that remain when only the channels in `keep` (boolean, (C,)) stay."""
        return self.architecture.parameters(self.widths(keep))

    def stream_groups(self) -> tuple[str, ...]:
        """The groups that residual streams (and the stem) consist of; all others are inner groups of one block."""
        streams = {name for block in self.architecture.blocks for name in (*block.source, *block.target)}
        return tuple(name for name in self.names if name in streams)

    def prices(self) -> Tensor:
        """Prices of the channels, (C,): parameters per convolution that reads or writes them, with all masks 1; the highest price is 1.

        The sum over convolutions is the channel's share of the sparsity loss's gradient. It is divided by their number because a
        channel of a residual stream, which many convolutions share, also does the work of many.
        """
        architecture = self.architecture
        cost, users = dict.fromkeys(self.names, 0.0), dict.fromkeys(self.names, 0)
        for conv in architecture.convs():
            for groups, partner in ((conv.source, conv.target), (conv.target, conv.source)):
                for name in groups:
                    cost[name] += conv.kernel**2 * architecture.width(partner)
                    users[name] += 1
        prices = torch.cat([torch.full((width,), cost[name] / users[name]) for name, width in architecture.groups.items()])
        return prices / prices.max()

    def per_group(self, values: Tensor) -> Tensor:
        """Return the value of every group, (G,) float64, of values (C,) that are equal within a group."""
        return values[list(self.offsets[:-1])].double()

    def sparsity_terms(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The constants of the sparsity loss, as keyword arguments of `kernels.channel_masks.sparsity_loss`."""
        return self.structure(device).terms(dtype)

    def structure(self, device: torch.device | str = "cpu") -> MaskStructure:
        """The groups and convolutions as `kernels.channel_masks.masks_and_sparsity` expects them, with tables on `device`."""

        def numbers(groups: Groups) -> tuple[int, ...]:
            return tuple(self.names.index(name) for name in groups)

        convs = [
            ConvolutionGroups(numbers(conv.source), numbers(conv.target), 0 if conv.source else IMAGE_CHANNELS, conv.kernel**2)
            for conv in self.architecture.convs()
        ]
        return MaskStructure.of(tuple(self.architecture.groups.values()), convs, device)
