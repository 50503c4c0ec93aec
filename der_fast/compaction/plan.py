"""From binary masks to what remains: pure functions of the description and the masks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from der_fast import native
from der_fast.compaction.selection import Selection
from der_fast.compaction.units import description
from der_fast.model.architecture import Groups
from der_fast.model.layout import MaskLayout


@dataclass(frozen=True)
class CompactionPlan:
    """What remains of an extractor.

    Attributes:
        layout: the layout of the full network.
        masks: boolean (C,), the binary masks that the plan was made from.
        keep: boolean (C,), the channels that stay: those of the masks, except inner channels of blocks that lost their branch.
        widths: channels of every group that stay.
        features: boolean (F,), the features that stay.
        constant: some residual stream kept nothing, so that the features no longer depend on the image; nothing is kept.
    """

    layout: MaskLayout
    masks: Tensor
    keep: Tensor
    widths: dict[str, int]
    features: Tensor
    constant: bool

    @property
    def parameters(self) -> int:
        """Parameters of the compact network."""
        return self.layout.architecture.parameters(self.widths)

    @property
    def selection(self) -> Selection:
        """The channels that stay, among those of the full network."""
        architecture = self.layout.architecture
        places = {name: part.nonzero().squeeze(1) for name, part in self.layout.by_group(self.keep).items()}
        return Selection(architecture, architecture.groups, places)

    def kept(self, groups: Groups) -> Tensor:
        """Return which channels of a tensor made of `groups` stay, boolean."""
        return self.keep[self.layout.slice_of(groups)]

    def masked(self, groups: Groups) -> Tensor:
        """Return the binary masks of a tensor made of `groups`, boolean."""
        return self.masks[self.layout.slice_of(groups)]


def plan(layout: MaskLayout, keep: Tensor) -> CompactionPlan:
    """Decide what remains.

    An empty inner group removes its block's branch, except for a constant (batch-norm of zeros): then all inner groups of the block
    are empty. An empty residual stream makes the features constant: the extractor then has width 0.

    Args:
        layout: the full network's mask layout.
        keep: boolean (C,), the binary masks; the plan holds a copy.

    Raises:
        ValueError: `keep` is not a boolean vector of the layout's length.
        BackendError: the native module is not built.
    """
    if keep.shape != (layout.channels,) or keep.dtype != torch.bool:
        raise ValueError(f"keep must be a boolean vector of {layout.channels} entries, not {keep.dtype} {tuple(keep.shape)}")
    masks = keep.detach().cpu().clone()
    architecture = layout.architecture
    facts, code = description(architecture, architecture.groups), native.dtype_code(torch.float32)
    found = native.plan(facts, native.facts_of(masks), align=1, weight_dtype=code, vector_dtype=code)
    kept = torch.from_numpy(found["keep"]).bool()
    widths = dict(zip(layout.names, found["widths"], strict=True))
    return CompactionPlan(layout, masks, kept, widths, kept[layout.slice_of(architecture.features)], found["constant"])


def with_floor(layout: MaskLayout, logits: Tensor, keep: Tensor, share: float) -> Tensor:
    """Keep at least ⌈share · width⌉ channels of every stream group, those with the largest logits.

    Args:
        layout: the full network's mask layout.
        logits: (C,) mask logits.
        keep: boolean (C,).
        share: share of a stream's channels, in [0, 1]; 0 returns `keep` as it is.
    """
    keep = keep.clone()
    if share <= 0:
        return keep
    streams = set(layout.stream_groups())
    parts, scores = layout.by_group(keep), layout.by_group(logits.detach())
    for name in layout.names:
        if name in streams:
            # 0.07 · 100 is 7.000000000000001 in floats, and must not cost an eighth channel.
            need = math.ceil(share * parts[name].numel() - 1e-9)
            parts[name][scores[name].topk(need).indices] = True
    return keep
