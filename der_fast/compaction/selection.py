"""Some of the channels of a network's groups: those that pruning keeps, or those that are alive among dead ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from der_fast.kernels.grouped_conv import padded
from der_fast.model.architecture import Architecture, Groups


@dataclass(frozen=True, eq=False)
class Selection:
    """Which channels of a wide network a narrow one has.

    Attributes:
        architecture: of both.
        wide: channels of every group of the wide network.
        places: by group, the positions in it of the narrow network's channels, int64 (channels,), increasing.
    """

    architecture: Architecture
    wide: Mapping[str, int]
    places: Mapping[str, Tensor]

    @property
    def narrow(self) -> dict[str, int]:
        """Channels of every group of the narrow network."""
        return {name: len(places) for name, places in self.places.items()}

    def rows(self, groups: Groups) -> Tensor:
        """Return the positions of the narrow network's channels in the wide one's tensor of `groups`, int64."""
        found, before = [], 0
        for name in groups:
            found.append(self.places[name] + before)
            before += self.wide[name]
        return torch.cat(found)


def among_dead(architecture: Architecture, widths: Mapping[str, int], multiple: int) -> Selection:
    """Return where a network's channels lie once every group is padded with dead ones to a multiple; empty groups stay empty.

    The live channels come first in their group.

    Args:
        architecture: the backbone.
        widths: live channels of every group.
        multiple: at least 1.
    """
    wide = {name: padded(width, multiple) for name, width in widths.items()}
    return Selection(architecture, wide, {name: torch.arange(width) for name, width in widths.items()})
