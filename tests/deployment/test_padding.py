"""Padded channels are exact zeros, and nothing that comes out changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from der_fast.compaction.program import program
from der_fast.deployment.network import FoldedNetwork
from der_fast.deployment.padding import padded_network
from der_fast.model.architecture import BACKBONES, build_architecture
from der_fast.model.layout import MaskLayout

Build = Callable[..., tuple[FoldedNetwork, Callable[[torch.Tensor], torch.Tensor]]]


def nonzero(tensor: torch.Tensor) -> list[float]:
    return sorted(tensor[tensor != 0].tolist())


@settings(max_examples=25, deadline=None)
@given(
    backbone=st.sampled_from(BACKBONES), seed=st.integers(0, 10**6), density=st.sampled_from([0.3, 0.7, 1.0]), multiple=st.integers(1, 9)
)
def test_the_same_comes_out(random_network: Build, backbone: str, seed: int, density: float, multiple: int) -> None:
    architecture = build_architecture(backbone, width=3)
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(MaskLayout(architecture).channels, generator=generator) < density
    network, _ = random_network(architecture, [keep, ~keep])
    padded = padded_network(network, multiple)
    images = torch.randn(2, 3, 9, 7, generator=generator)
    wanted, found = network(images)[0], padded(images)[0]
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    for part, wide in zip(network.extractors, padded.extractors, strict=True):
        assert wide.features == part.features
        assert all(width % multiple == 0 for width in wide.widths.values())
        assert wide.ops == program(architecture, wide.widths)
        for op in wide.ops:
            for name, shape in op.tensors().items():
                assert wide.tensors[name].shape == shape
                # Every weight is there once, and all else is zero.
                assert nonzero(wide.tensors[name]) == nonzero(part.tensors[name])


def test_padding_twice(random_network: Build) -> None:
    """A network whose arenas were padded already: the classifier still reads the true features."""
    architecture = build_architecture("resnet20", width=6)
    keep = torch.rand(MaskLayout(architecture).channels, generator=torch.Generator().manual_seed(6)) < 0.6
    network, _ = random_network(architecture, [keep], align=4)
    padded = padded_network(network, 8)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(padded(images)[0], network(images)[0], rtol=1e-5, atol=1e-5)
    assert padded.extractors[0].widths != network.extractors[0].widths


@pytest.mark.parametrize("multiple", [1, 4])
def test_what_needs_no_padding_is_left_as_it_is(random_network: Build, multiple: int) -> None:
    architecture = build_architecture("resnet20", width=4)
    network, _ = random_network(architecture, [torch.ones(MaskLayout(architecture).channels, dtype=torch.bool)])
    assert padded_network(network, multiple).extractors[0] is network.extractors[0]
