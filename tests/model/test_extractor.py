"""The extractor: shapes, masks, initial weights."""

from __future__ import annotations

import pytest
import torch

from der_fast.model.architecture import BACKBONES, build_architecture
from der_fast.model.extractor import Convolution, Extractor, Initialisation, MaskedBatchNorm
from der_fast.model.layout import MaskLayout

STEMS = ("small", "imagenet")
cases = pytest.mark.parametrize(("backbone", "stem"), [(backbone, stem) for backbone in BACKBONES for stem in STEMS])


def seeded(number):
    return torch.Generator().manual_seed(number)


def new(backbone="resnet18", stem="small", width=2, seed=0):
    """An extractor whose batch-norm differs from channel to channel, so that no channel can pass for another."""
    extractor = Extractor(build_architecture(backbone, width=width, stem=stem)).initialise(seeded(seed))
    generator = seeded(seed + 1)
    with torch.no_grad():
        for norm in (module for module in extractor.modules() if isinstance(module, MaskedBatchNorm)):
            norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) + 0.5)
            norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator) * 0.3)
    return extractor


def images(*shape, seed=5):
    return torch.randn(*shape, generator=seeded(seed))


@cases
@pytest.mark.parametrize("size", [(32, 32), (7, 9), (33, 20), (1, 1)])
def test_features_for_any_image_size(backbone, stem, size):
    extractor = new(backbone, stem).eval()
    with torch.no_grad():
        features = extractor(images(3, 3, *size))
    assert features.shape == (3, extractor.features)
    assert bool(torch.isfinite(features).all())


@cases
def test_maps_shrink_as_the_stem_and_the_stages_say(backbone, stem):
    extractor = new(backbone, stem).eval()
    shapes = []
    handles = [block.register_forward_hook(lambda _module, _inputs, out: shapes.append(tuple(out.shape[1:]))) for block in extractor.blocks]
    with torch.no_grad():
        extractor(images(1, 3, 65, 50))
    for handle in handles:
        handle.remove()
    # Padding keeps every (odd or even) side at ⌈side / stride⌉.
    side, other = (17, 13) if stem == "imagenet" else (65, 50)
    for block, shape in zip(extractor.architecture.blocks, shapes, strict=True):
        side, other = -(-side // block.stride), -(-other // block.stride)
        assert shape == (extractor.architecture.width(block.target), side, other)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_feature_length_follows_the_width(backbone):
    times = {"resnet20": 4, "resnet32": 4, "resnet50": 32}.get(backbone, 8)
    for width in (1, 5):
        extractor = new(backbone, width=width).eval()
        assert extractor.features == times * width
        with torch.no_grad():
            assert extractor(images(1, 3, 8, 8)).shape == (1, times * width)


@cases
@pytest.mark.parametrize("training", [True, False])
def test_masks_of_ones_change_no_bit(backbone, stem, training):
    ones = torch.ones(MaskLayout(build_architecture(backbone, width=2)).channels)
    batch = images(4, 3, 19, 23)
    with torch.no_grad():
        with_masks, without = (new(backbone, stem).train(training)(batch, masks) for masks in (ones, None))
    assert torch.equal(with_masks, without)
    assert bool((without != 0).any())


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name != "preact_resnet18"])
@pytest.mark.parametrize("training", [True, False])
def test_a_pruned_channel_is_exactly_zero_in_every_tensor_of_its_stream(backbone, training):
    extractor = new(backbone, width=3).train(training)
    layout = MaskLayout(extractor.architecture)
    masks = torch.ones(layout.channels)
    for part in layout.by_group(masks).values():
        part[1] = 0
    maps = []
    handles = [block.register_forward_hook(lambda _module, _inputs, out: maps.append(out)) for block in extractor.blocks]
    with torch.no_grad():
        extractor(images(2, 3, 9, 11), masks)
    for handle in handles:
        handle.remove()
    assert len(maps) == len(extractor.architecture.blocks)
    for block, out in zip(extractor.architecture.blocks, maps, strict=True):
        pruned = masks[layout.slice_of(block.target)] == 0
        assert 0 < int(pruned.sum()) < len(pruned)
        assert bool((out[:, pruned] == 0).all())
        assert bool((out[:, ~pruned] != 0).any())


@cases
def test_each_mask_reaches_the_features(backbone, stem):
    extractor = new(backbone, stem, width=2).double().train()
    layout = MaskLayout(extractor.architecture)
    masks = torch.full((layout.channels,), 0.7, dtype=torch.float64, requires_grad=True)
    extractor(images(4, 3, 21, 18).double(), masks).square().sum().backward()
    for name, gradient in layout.by_group(masks.grad).items():
        assert bool((gradient != 0).any()), name


def test_masks_of_another_length_are_refused():
    extractor = new("resnet18", width=2)
    channels = MaskLayout(extractor.architecture).channels
    for length in (0, 1, channels - 1, channels + 1):
        with pytest.raises(ValueError, match=rf"resnet18 must have {channels} entries, but their shape is \({length},\)"):
            extractor(images(2, 3, 8, 8), torch.ones(length))


def test_a_compact_network_takes_no_masks():
    architecture = build_architecture("resnet18", width=2)
    compact = Extractor(architecture, architecture.groups).initialise(seeded(0)).eval()
    assert compact(images(1, 3, 8, 8)).shape == (1, 16)
    with pytest.raises(ValueError, match="must be None because the network is compact"):
        compact(images(1, 3, 8, 8), torch.ones(MaskLayout(architecture).channels))


@pytest.mark.parametrize("training", [True, False])
def test_images_stay_as_they_are(training):
    for backbone in BACKBONES:
        batch = images(2, 3, 16, 16)
        before = batch.clone()
        with torch.no_grad():
            new(backbone).train(training)(batch)
        assert torch.equal(batch, before)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_channels_last_gives_the_same_features(backbone):
    extractor, batch = new(backbone, width=4).eval(), images(2, 3, 13, 15)
    with torch.no_grad():
        expected = extractor(batch)
        found = extractor.to(memory_format=torch.channels_last)(batch.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_bfloat16_autocast_trains(backbone):
    extractor = new(backbone, width=4).train()
    masks = torch.full((extractor.maskable,), 0.9, requires_grad=True)
    batch = images(4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        features = extractor(batch, masks)
    assert features.dtype == torch.bfloat16
    features.float().square().sum().backward()
    for parameter in (*extractor.parameters(), masks):
        assert parameter.grad.dtype == torch.float32 and bool(torch.isfinite(parameter.grad).all())
    extractor.eval()
    with torch.no_grad():
        exact = extractor(batch, masks)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = extractor(batch, masks).float()
    assert 0 < float((rounded - exact).abs().mean() / exact.abs().mean()) < 0.05


@pytest.mark.parametrize("backbone", BACKBONES)
def test_initial_weights_come_from_the_generator_alone(backbone):
    architecture = build_architecture(backbone, width=2)
    torch.manual_seed(1)
    first = Extractor(architecture).initialise(seeded(11)).state_dict()
    torch.manual_seed(2)
    second = Extractor(architecture).initialise(seeded(11)).state_dict()
    other = Extractor(architecture).initialise(seeded(12)).state_dict()
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert not torch.equal(other["stem.weight"], first["stem.weight"])


def scaled(extractor, gain, fan_of):
    """Check every convolution's weights: divided by the standard deviation that they should have, they are draws from N(0, 1)."""
    for module in extractor.modules():
        if isinstance(module, Convolution):
            draws = module.weight.detach() * (fan_of(*module.weight.shape) / gain) ** 0.5
            # The mean and the variance of n draws from N(0, 1) have spreads of 1/√n and √(2/n).
            assert abs(float(draws.mean())) < 5 / draws.numel() ** 0.5
            assert abs(float(draws.var()) - 1) < 5 * (2 / draws.numel()) ** 0.5


def test_initial_weights_have_the_variance_of_pytorchs_default():
    extractor = Extractor(build_architecture("resnet18", width=16)).initialise(seeded(0))
    scaled(extractor, 1 / 3, lambda outputs, inputs, height, width: inputs * height * width)


@pytest.mark.parametrize(("backbone", "ends"), [("resnet18", 8), ("preact_resnet18", 0)])
def test_another_initialisation(backbone, ends, monkeypatch):
    monkeypatch.setattr("der_fast.model.extractor.INITIALISATION", Initialisation("out", 2, branches=0))
    extractor = Extractor(build_architecture(backbone, width=16)).initialise(seeded(0))
    scaled(extractor, 2, lambda outputs, inputs, height, width: outputs * height * width)
    torch.manual_seed(0)
    theirs = torch.nn.init.kaiming_normal_(torch.empty(64, 16, 3, 3), mode="fan_out", nonlinearity="relu")
    ours = Initialisation("out", 2).draw(theirs, seeded(0))
    assert float(ours.std() / theirs.std()) == pytest.approx(1, abs=0.05)
    gammas = [float(norm.weight.detach()[0]) for norm in extractor.modules() if isinstance(norm, MaskedBatchNorm)]
    assert gammas.count(0) == ends and gammas.count(1) == len(gammas) - ends
    assert all(bool((block.norms[-1].weight == 0).all()) for block in extractor.blocks) == bool(ends)


def test_initialise_resets_batch_norm():
    extractor = new("resnet20")
    extractor.train()(images(4, 3, 8, 8))
    norms = [module for module in extractor.modules() if isinstance(module, MaskedBatchNorm)]
    assert any(bool((norm.running_mean != 0).any()) for norm in norms)
    assert extractor.initialise(seeded(3)) is extractor
    for norm in norms:
        assert bool((norm.weight == 1).all()) and bool((norm.bias == 0).all())
        assert bool((norm.running_mean == 0).all()) and bool((norm.running_var == 1).all())


@cases
def test_no_channels_anywhere(backbone, stem):
    architecture = build_architecture(backbone, width=2, stem=stem)
    empty = Extractor(architecture, dict.fromkeys(architecture.groups, 0)).initialise(seeded(0)).eval()
    assert empty.features == 0
    assert empty(images(3, 3, 9, 7)).shape == (3, 0)
    assert sum(parameter.numel() for parameter in empty.parameters()) == 0


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize("size", [(9, 8), (1, 2)])
def test_convolution_without_channels_yields_zeros_of_the_right_size(inputs, outputs, kernel, stride, size):
    conv = build_architecture("resnet18").stem
    shaped = type(conv)("any", ("a",), ("b",), kernel, stride)
    full = torch.nn.Conv2d(1, 1, kernel, stride, padding=kernel // 2)(torch.zeros(1, 1, *size))
    out = Convolution(shaped, inputs, outputs)(torch.ones(2, inputs, *size))
    assert out.shape == (2, outputs, *full.shape[2:])
    assert bool((out == 0).all())
