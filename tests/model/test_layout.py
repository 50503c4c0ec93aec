"""The mask vector's layout, and the sparsity loss of real networks against a loop over their convolutions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from der_fast.kernels.channel_masks import sparsity_loss
from der_fast.model.architecture import BACKBONES, build_architecture
from der_fast.model.extractor import Convolution, Extractor
from der_fast.model.layout import MaskLayout

few = settings(max_examples=20, deadline=None, derandomize=True)


def layout_of(backbone, width=3, stem="small"):
    return MaskLayout(build_architecture(backbone, width=width, stem=stem))


def literal_loss(layout, masks):
    """Σ K·‖m_in‖₁·‖m_out‖₁ / Σ K·c_in·c_out over all convolutions, and ∂/∂m of every group, in Python floats."""
    architecture = layout.architecture
    sums = {name: float(part.sum()) for name, part in layout.by_group(masks.detach().double()).items()}
    soft, full, slopes = 0.0, 0.0, dict.fromkeys(sums, 0.0)
    for conv in architecture.convs():
        area = conv.kernel * conv.kernel
        read = sum(sums[name] for name in conv.source) if conv.source else 3.0
        written = sum(sums[name] for name in conv.target)
        soft += area * read * written
        full += (
            area
            * (sum(architecture.groups[n] for n in conv.source) if conv.source else 3)
            * sum(architecture.groups[n] for n in conv.target)
        )
        for name in conv.source:
            slopes[name] += area * written
        for name in conv.target:
            slopes[name] += area * read
    return soft / full, {name: slope / full for name, slope in slopes.items()}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_groups_lie_side_by_side_and_cover_the_vector_once(backbone):
    layout = layout_of(backbone)
    numbers = torch.arange(layout.channels)
    parts = layout.by_group(numbers)
    assert torch.equal(torch.cat(list(parts.values())), numbers)
    assert {name: len(part) for name, part in parts.items()} == dict(layout.architecture.groups)
    assert len(layout.offsets) == len(layout.names) + 1 and layout.offsets[0] == 0
    for name, part in parts.items():
        assert torch.equal(numbers[layout.slice_of((name,))], part)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_tensor_of_the_network_is_one_slice(backbone):
    layout = layout_of(backbone)
    numbers = torch.arange(layout.channels)
    parts = layout.by_group(numbers)
    tensors = {groups for conv in layout.architecture.convs() for groups in (conv.source, conv.target) if groups}
    for groups in tensors:
        assert torch.equal(numbers[layout.slice_of(groups)], torch.cat([parts[name] for name in groups]))


def test_groups_that_do_not_lie_side_by_side_have_no_slice():
    layout = layout_of("resnet20")
    assert layout.slice_of(("stage1", "stage2")) == slice(0, 6)
    for groups in (("stage1", "stage3"), ("stage2", "stage1"), ("stage3", "stage1.1")):
        with pytest.raises(ValueError, match=r"resnet20 do not lie side by side"):
            layout.slice_of(groups)


@pytest.mark.parametrize(
    ("backbone", "streams"),
    [
        ("resnet18", ("stage1", "stage2", "stage3", "stage4")),
        ("preact_resnet18", ("stage1", "stage2", "stage3", "stage4")),
        ("resnet50", ("stem", "stage1", "stage2", "stage3", "stage4")),
        ("resnet32", ("stage1", "stage2", "stage3")),
    ],
)
def test_stream_groups(backbone, streams):
    assert layout_of(backbone).stream_groups() == streams


@few
@given(backbone=st.sampled_from(BACKBONES), seed=st.integers(0, 1000), density=st.floats(0, 1))
def test_widths_and_parameters_of_what_is_kept(backbone, seed, density):
    layout = layout_of(backbone)
    keep = torch.rand(layout.channels, generator=torch.Generator().manual_seed(seed)) < density
    widths = layout.widths(keep)
    assert widths == {name: sum(part.tolist()) for name, part in layout.by_group(keep).items()}
    built = Extractor(layout.architecture, widths)
    assert layout.kept_parameters(keep) == sum(parameter.numel() for parameter in built.parameters())


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_sparsity_loss_of_soft_masks_is_the_loop_over_convolutions(backbone, stem):
    layout = layout_of(backbone, width=5, stem=stem)
    masks = torch.rand(layout.channels, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    loss = sparsity_loss(masks, **layout.sparsity_terms(torch.float64))
    expected, slopes = literal_loss(layout, masks)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    for name, gradient in layout.by_group(masks.grad).items():
        assert bool((gradient == gradient[0]).all())
        assert gradient[0].item() == pytest.approx(slopes[name], rel=1e-12)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_sparsity_loss_of_binary_masks_is_the_share_of_weights_that_stay(backbone, stem):
    layout = layout_of(backbone, stem=stem)
    keep = torch.rand(layout.channels, generator=torch.Generator().manual_seed(8)) < 0.6

    def weights(widths):
        return sum(module.weight.numel() for module in Extractor(layout.architecture, widths).modules() if isinstance(module, Convolution))

    share = weights(layout.widths(keep)) / weights(None)
    assert 0.1 < share < 0.9
    assert sparsity_loss(keep.double(), **layout.sparsity_terms(torch.float64)).item() == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_single_precision_is_enough_at_full_width(backbone):
    layout = MaskLayout(build_architecture(backbone))
    masks = torch.rand(layout.channels, generator=torch.Generator().manual_seed(2))
    loss = sparsity_loss(masks, **layout.sparsity_terms())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(literal_loss(layout, masks)[0], rel=1e-5)
