"""Small networks with any mask pattern, and their arenas, as fixtures that are functions."""

from __future__ import annotations

import pytest
import torch

from der_fast.compaction import Arena, pack, plan
from der_fast.model.architecture import build_architecture
from der_fast.model.extractor import Extractor, MaskedBatchNorm
from der_fast.model.layout import MaskLayout

PATTERNS = ("all", "most", "few", "one", "lost", "nothing")


def keep_of(layout: MaskLayout, pattern: str, seed: int = 0) -> torch.Tensor:
    """Binary masks: every channel, 70 %, 30 %, one per group, 50 % with every other block's branch lost, or none."""
    share = {"all": 1.1, "most": 0.7, "few": 0.3, "one": 0.0, "lost": 0.5, "nothing": 0.0}[pattern]
    keep = torch.rand(layout.channels, generator=torch.Generator().manual_seed(seed)) < share
    parts = layout.by_group(keep)
    if pattern != "nothing":
        for name in layout.names:
            parts[name][seed % len(parts[name])] = True
    if pattern == "lost":
        inner = [name for name in layout.names if name not in layout.stream_groups()]
        for name in inner[::2]:
            parts[name][:] = False
    return keep


def network(backbone: str, *, width: int = 8, stem: str = "small", seed: int = 0) -> Extractor:
    """A dense extractor in evaluation mode whose batch-norm has something to fold."""
    draw = torch.Generator().manual_seed(seed)
    net = Extractor(build_architecture(backbone, width=width, stem=stem)).initialise(draw).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, MaskedBatchNorm):
                module.weight.uniform_(0.5, 1.5, generator=draw)
                module.bias.normal_(generator=draw)
                module.running_mean.normal_(generator=draw)
                module.running_var.uniform_(0.5, 2, generator=draw)
    return net


def arena(
    backbone: str,
    pattern: str = "most",
    *,
    width: int = 8,
    stem: str = "small",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    align: int = 1,
    layout: str = "KRSC",
) -> Arena:
    """The folded weights of `network` under the masks of a pattern."""
    net = network(backbone, width=width, stem=stem, seed=seed)
    masks = MaskLayout(net.architecture)
    return pack(net, plan(masks, keep_of(masks, pattern, seed)), dtype=dtype, align=align, layout=layout)


def pictures(count: int = 5, height: int = 13, width: int = 11, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Images of an odd size."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(9)).to(dtype)


@pytest.fixture(name="network_of")
def _network_of():
    return network


@pytest.fixture(name="keep_of")
def _keep_of():
    return keep_of


@pytest.fixture(name="arena_of")
def _arena_of():
    return arena


@pytest.fixture(name="pictures")
def _pictures():
    return pictures
