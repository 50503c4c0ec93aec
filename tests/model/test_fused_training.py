"""The training step on the kernels computes what autograd makes of the plain extractor: outputs, gradients, running statistics."""

from __future__ import annotations

import copy

import pytest
import torch

from der_fast.kernels import choices
from der_fast.kernels.masked_bn import Running
from der_fast.model import chain, chain_backward, chain_node, fused_training, paths
from der_fast.model.architecture import BACKBONES, build_architecture
from der_fast.model.extractor import Extractor, MaskedBatchNorm
from der_fast.model.fused_training import FusedTraining
from der_fast.model.layout import MaskLayout
from der_fast.model.mask_slices import MaskSlices
from der_fast.model.paths import BACKWARD, CHAIN, CUDNN, EPILOGUE, FORWARD, Layer

# Two orders of the same sums in double precision; tiny batches make batch-norm badly conditioned, and fifty of them stand in a row.
EXACT = 1e-9


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def network(backbone, stem="small", widths=None, seed=0, dtype=torch.float64):
    """A network whose batch-norm parameters are no ones and zeros."""
    architecture = build_architecture(backbone, width=2, stem=stem)
    extractor = Extractor(architecture, widths).initialise(seeded(seed))
    for module in extractor.modules():
        if isinstance(module, MaskedBatchNorm):
            module.weight.data.add_(torch.rand(module.weight.shape, generator=seeded(seed + 1)) - 0.3)
            module.bias.data.add_(torch.rand(module.bias.shape, generator=seeded(seed + 2)) - 0.5)
    return extractor.to(dtype).train()


def draw(*shape, seed=3, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def run(forward, parameters, masks, images):
    """Features, and gradients of a random linear function of them."""
    features = forward(images, masks)
    (features * draw(*features.shape, seed=9, dtype=features.dtype)).sum().backward()
    gradients = [parameter.grad for parameter in parameters]
    return features.detach(), gradients if masks is None or not masks.requires_grad else [*gradients, masks.grad]


def distance(found, wanted):
    """Largest difference relative to the largest entry."""
    if wanted is None:
        assert found is None
        return 0.0
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)) if wanted.numel() else 0.0


def compare(extractor, images, masks, bound=EXACT, **options):
    """Run both and compare everything that a training step changes or returns."""
    other = copy.deepcopy(extractor)
    pairs = [masks, None if masks is None else masks.detach().clone().requires_grad_(masks.requires_grad)]
    wanted, wanted_gradients = run(extractor, list(extractor.parameters()), pairs[0], images)
    step = FusedTraining(other, images.dtype, backend="reference", **options)
    found, gradients = run(step, list(other.parameters()), pairs[1], images)
    assert distance(found, wanted) < bound
    for gradient, expected in zip(gradients, wanted_gradients, strict=True):
        assert distance(gradient, expected) < bound
    for statistic, expected in zip(other.buffers(), extractor.buffers(), strict=True):
        assert distance(statistic, expected) < bound
    assert list(other.state_dict()) == list(extractor.state_dict())


CASES = [(backbone, "small") for backbone in BACKBONES] + [
    ("resnet18", "imagenet"),
    ("resnet20", "imagenet"),
    ("preact_resnet18", "imagenet"),
]


@pytest.mark.parametrize(("backbone", "stem"), CASES)
@pytest.mark.parametrize("path", [CUDNN, CHAIN])
def test_every_backbone(backbone, stem, path):
    extractor = network(backbone, stem)
    masks = torch.rand(extractor.maskable, generator=seeded(4), dtype=torch.float64).requires_grad_()
    side = 35 if stem == "imagenet" else 17
    compare(extractor, draw(3, 3, side, side + 2), masks, path=path)


@pytest.mark.parametrize("path", [EPILOGUE, paths.UNSTRIDED])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_other_paths(backbone, path):
    extractor = network(backbone)
    masks = torch.rand(extractor.maskable, generator=seeded(4), dtype=torch.float64).requires_grad_()
    compare(extractor, draw(3, 3, 15, 18), masks, path=path)


@pytest.mark.parametrize("backbone", ["resnet20", "resnet18", "preact_resnet18"])
def test_without_masks_and_with_masks_that_are_not_learned(backbone):
    compare(network(backbone), draw(2, 3, 12, 13), None, path=CHAIN)
    binary = (torch.rand(network(backbone).maskable, generator=seeded(5)) < 0.6).double()
    binary[:2] = 1
    compare(network(backbone), draw(2, 3, 12, 13), binary, path=CHAIN)


@pytest.mark.parametrize("backbone", ["resnet20", "resnet18", "resnet50", "preact_resnet18"])
def test_a_compact_network_and_a_block_that_lost_its_branch(backbone):
    architecture = build_architecture(backbone, width=2)
    inner = [conv.target[0] for block in architecture.blocks for conv in block.convs[:-1]]
    widths = {name: 1 + number % 3 for number, name in enumerate(architecture.groups)}
    lost = architecture.blocks[1]
    widths.update({name: 0 for name in inner if name in {conv.target[0] for conv in lost.convs[:-1]}})
    compare(network(backbone, widths=widths), draw(3, 3, 14, 14), None, path=CHAIN)


def test_no_channels_anywhere():
    architecture = build_architecture("resnet18", width=2)
    empty = Extractor(architecture, dict.fromkeys(architecture.groups, 0)).train()
    assert FusedTraining(empty, torch.float32, path=CHAIN, backend="reference")(torch.ones(2, 3, 8, 8)).shape == (2, 0)


WAYS = [
    (CUDNN, CUDNN, CUDNN),
    (EPILOGUE, CUDNN, CHAIN),
    (CHAIN, CHAIN, CUDNN),
    (CHAIN, CHAIN, CHAIN),
    (CUDNN, CHAIN, CHAIN),
    (CHAIN, CUDNN, CUDNN),
]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("residual", [chain.IDENTITY, chain.PROJECTION, chain.WIDENED, chain.NOTHING])
def test_any_mixture_of_ways_in_one_block(seed, residual):
    kernels, stride = [1, 3, 1], 1 if residual in (chain.IDENTITY, chain.NOTHING) else 2
    channels = [3, 5, 2, 3 if residual == chain.IDENTITY else 6]
    shapes = [(channels[i + 1], channels[i], kernels[i], stride if i == 1 else 1) for i in range(3)]
    if residual == chain.PROJECTION:
        shapes.append((channels[3], channels[0], 1, stride))
    x = draw(2, 3, 7, 8).contiguous(memory_format=torch.channels_last)

    def outcome(ways):
        layers = tuple(Layer(shape[2], shape[3], *way) for shape, way in zip(shapes, ways, strict=True))
        flat = []
        for number, (outputs, inputs, kernel, _) in enumerate(shapes):
            weight = draw(outputs, inputs, kernel, kernel, seed=20 + number).contiguous(memory_format=torch.channels_last).requires_grad_()
            vectors = [(draw(outputs, seed=30 + 3 * number + i) + 1).requires_grad_() for i in range(3)]
            flat += [weight, weight.detach(), *vectors]
        source = x.clone().requires_grad_()
        running = [Running(draw(shape[0], seed=60), draw(shape[0], seed=61).abs(), 0.3) for shape in shapes]
        out = chain_node.run_block(chain.ChainBlock(layers, residual, stride, "reference"), source, flat, running)
        (out * draw(*out.shape, seed=50)).sum().backward()
        leaves = [source, *(leaf for leaf in flat if leaf.requires_grad)]
        moved = [value for one in running for value in (one.mean, one.variance)]
        assert not any(torch.equal(value, draw(len(value), seed=60)) for value in moved)
        return [out.detach(), *moved, *(leaf.grad for leaf in leaves)]

    picked = torch.randint(0, len(WAYS), (len(shapes),), generator=seeded(seed)).tolist()
    for found, wanted in zip(outcome([WAYS[index] for index in picked]), outcome([WAYS[0]] * len(shapes)), strict=True):
        assert distance(found, wanted) < EXACT


def test_single_precision_is_about_as_exact_as_autograd():
    masks = torch.rand(network("resnet18").maskable, generator=seeded(4)).requires_grad_()
    images = draw(4, 3, 16, 16)
    exact = network("resnet18")
    wanted, gradients = run(exact, list(exact.parameters()), masks.detach().double().requires_grad_(), images)

    def errors(forward, extractor):
        own = masks.detach().clone().requires_grad_()
        found, rounded = run(forward, list(extractor.parameters()), own, images.float())
        return [distance(one.double(), other) for one, other in zip([found, *rounded], [wanted, *gradients], strict=True)]

    plain, chained = network("resnet18", dtype=torch.float32), network("resnet18", dtype=torch.float32)
    usual = errors(plain, plain)
    for error, other in zip(errors(FusedTraining(chained, torch.float32, path=CHAIN, backend="reference"), chained), usual, strict=True):
        # The largest of thousands of rounding errors scatters; a wrong term is five orders of magnitude larger.
        assert error < max(8 * other, 8 * max(usual) / 10, 1e-5)


@pytest.mark.parametrize("path", [CUDNN, CHAIN])
def test_bfloat16_keeps_weights_statistics_and_features_in_float32(path):
    extractor = network("resnet18", dtype=torch.float32)
    other = copy.deepcopy(extractor)
    masks = torch.rand(extractor.maskable, generator=seeded(4)).requires_grad_()
    images = draw(4, 3, 16, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = extractor(images, masks.detach()).float()
        found = FusedTraining(other, torch.bfloat16, path=path, backend="reference")(images, masks)
    found.square().sum().backward()
    assert found.dtype == torch.float32
    assert distance(found.detach(), wanted.detach()) < 0.1
    for tensor in (*other.parameters(), *other.buffers(), masks):
        assert tensor.dtype == torch.float32
    for leaf in (*other.parameters(), masks):
        assert leaf.grad.dtype == torch.float32 and bool(leaf.grad.isfinite().all())


def test_activations_between_nodes_are_in_the_asked_dtype_and_weights_are_cast_once(monkeypatch):
    seen, casts = [], []
    original, copying = fused_training.run_block, torch._foreach_copy_
    monkeypatch.setattr(
        fused_training,
        "run_block",
        lambda block, x, flat, *rest, **options: (
            seen.append((x.dtype, flat[1].dtype, flat[2].dtype)) or original(block, x, flat, *rest, **options)
        ),
    )
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *tensors: casts.append(len(tensors[0])) or copying(*tensors))
    extractor = network("resnet20", dtype=torch.float32)
    FusedTraining(extractor, torch.bfloat16, path=CHAIN, backend="reference")(draw(2, 3, 8, 8, dtype=torch.float32))
    assert set(seen) == {(torch.bfloat16, torch.bfloat16, torch.float32)} and len(seen) == 10
    assert casts == [19]


def test_masks_of_another_length_no_images_and_single_values_are_refused():
    step = FusedTraining(network("resnet18"), torch.float64, path=CHAIN, backend="reference")
    with pytest.raises(ValueError, match=r"resnet18 must have \d+ entries, but their shape is \(3,\)"):
        step(draw(2, 3, 8, 8), torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="batch without images"):
        step(draw(0, 3, 8, 8))
    for path in (CUDNN, CHAIN):
        step = FusedTraining(network("resnet18"), torch.float64, path=path, backend="reference")
        with pytest.raises(ValueError, match="more than 1 value per channel when training"):
            step(draw(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"unknown path 'fast'.*cudnn, epilogue, chain"):
        FusedTraining(network("resnet18"), torch.float64, path="fast")


def test_masks_that_are_no_numbers_are_not_hidden():
    extractor = network("resnet18")
    masks = torch.ones(extractor.maskable, dtype=torch.float64)
    masks[MaskLayout(extractor.architecture).slice_of(extractor.architecture.features)] = torch.nan
    assert bool(FusedTraining(extractor, torch.float64, path=CHAIN, backend="reference")(draw(2, 3, 8, 8), masks).isnan().all())


def test_any_memory_format_of_images_and_weights():
    extractor = network("resnet20").to(memory_format=torch.channels_last)
    images = draw(2, 3, 9, 10)
    compare(extractor, images, None, path=CHAIN)
    compare(network("resnet20"), images.contiguous(memory_format=torch.channels_last), None, path=CHAIN)


def test_overlapping_slices_add_their_gradients():
    where = [slice(0, 3), slice(2, 5), slice(0, 3), slice(4, 5)]
    slices = MaskSlices(where, 6)
    masks, plain = torch.arange(6.0, requires_grad=True), torch.arange(6.0, requires_grad=True)
    weights = [draw(part.stop - part.start, seed=number, dtype=torch.float32) for number, part in enumerate(where)]
    for vector, parts in ((masks, slices(masks)), (plain, [plain[part] for part in where])):
        assert all(torch.equal(part, vector.detach()[cut]) for part, cut in zip(parts, where, strict=True))
        sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True)).backward()
    torch.testing.assert_close(masks.grad, plain.grad)
    assert masks.grad[5] == 0
    assert [part.data_ptr() for part in slices(masks.detach())] == [masks.detach()[cut].data_ptr() for cut in where]


LAYERS = (Layer(3, 2), Layer(3, 1), Layer(7, 2))


def test_names_stand_for_ways():
    assert [layer.forward for layer in paths.forward_layers(LAYERS, CHAIN)] == [CHAIN, CHAIN, CUDNN]
    assert [layer.forward for layer in paths.forward_layers(LAYERS, paths.UNSTRIDED)] == [CUDNN, CHAIN, CUDNN]
    assert [(layer.dgrad, layer.wgrad) for layer in paths.backward_layers(LAYERS, paths.UNSTRIDED)] == [
        (CUDNN,) * 2,
        (CHAIN,) * 2,
        (CUDNN,) * 2,
    ]
    assert [(layer.dgrad, layer.wgrad) for layer in paths.backward_layers(LAYERS, paths.DGRAD)] == [(CHAIN, CUDNN)] * 2 + [(CUDNN, CUDNN)]
    assert paths.distinct(LAYERS[:1], FORWARD) == (CUDNN, EPILOGUE, CHAIN)
    assert paths.distinct(LAYERS[1:2], FORWARD) == (CUDNN, EPILOGUE, CHAIN)
    assert paths.distinct(LAYERS[2:], FORWARD) == paths.distinct(LAYERS[2:], BACKWARD) == (CUDNN,)
    assert paths.distinct(LAYERS[1:2], BACKWARD) == (CUDNN, CHAIN, paths.DGRAD, paths.APART)
    assert [layer.joins for layer in paths.backward_layers(LAYERS, CHAIN)] == [True, False, False]
    assert not any(layer.joins for name in (CUDNN, paths.UNSTRIDED, paths.APART) for layer in paths.backward_layers(LAYERS, name))


def test_auto_measures_each_direction_of_each_shape_once(monkeypatch):
    times = {CUDNN: 1.0, EPILOGUE: 0.5, CHAIN: 0.99, paths.UNSTRIDED: 2.0, paths.DGRAD: 0.9, paths.APART: 1.5}
    measured = []

    def measure(runs, device):
        for run_it in runs.values():
            run_it()
        measured.append(tuple(runs))
        return {name: times[name] for name in runs}

    monkeypatch.setattr(choices, "measure", measure)
    store = choices.Choices()
    extractor = network("resnet18")
    before = {name: value.clone() for name, value in extractor.state_dict().items()}
    step = FusedTraining(extractor, torch.float64, backend="reference", choices=store)
    with torch.no_grad():
        step(draw(2, 3, 8, 8))
    # Stem, and per stage one block with a projection and one without; the first stage has two of the latter, one of them behind the stem.
    shapes = 1 + 1 + 3 * 2
    count = 2 * shapes + 1
    assert len(measured) == count == len(store.record())
    assert {key.rpartition("|")[2] for key in store.record()} == {
        "forward",
        *(f"backward{way} after {EPILOGUE}" for way in ("", " through a sign", " through bits", " through bits and a projection")),
    }
    assert set(store.record().values()) == {EPILOGUE, paths.DGRAD}
    # Timing moves no statistics: they have seen one batch.
    once = network("resnet18")
    with torch.no_grad():
        once(draw(2, 3, 8, 8))
    for name, value in extractor.state_dict().items():
        torch.testing.assert_close(value, once.state_dict()[name])
        assert torch.equal(value, before[name]) or "running" in name
    again = FusedTraining(network("resnet18"), torch.float64, backend="reference", choices=store)
    again(draw(2, 3, 8, 8)).sum().backward()
    step(draw(1, 3, 8, 8, seed=8).repeat(2, 1, 1, 1)[:2])
    assert len(measured) == count


def test_a_measured_step_computes_the_same(monkeypatch):
    monkeypatch.setattr(choices, "measure", lambda runs, device: {name: float(number) for number, name in enumerate(reversed(runs))})
    masks = torch.rand(network("resnet18").maskable, generator=seeded(4), dtype=torch.float64).requires_grad_()
    compare(network("resnet18"), draw(3, 3, 9, 9), masks, choices=choices.Choices())


@pytest.mark.parametrize("operation", ["conv_forward", "conv_dgrad", "conv_dgrad_joined", "conv_wgrad"])
@pytest.mark.parametrize("faulty", [True, False])
def test_a_way_that_computes_something_else_is_not_taken_however_fast(monkeypatch, caplog, operation, faulty):
    order = [CHAIN, paths.DGRAD, paths.APART, EPILOGUE, paths.UNSTRIDED, CUDNN]
    monkeypatch.setattr(choices, "measure", lambda runs, device: {name: float(order.index(name) + 1) for name in runs})
    home = chain if operation == "conv_forward" else chain_backward
    right = getattr(home, operation)

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        spoilt = (result[0] if isinstance(result, tuple) else result).clone()
        spoilt[: len(spoilt) // 8 or 1] *= 1.25
        return (spoilt, *result[1:]) if isinstance(result, tuple) else spoilt

    if faulty:
        monkeypatch.setattr(home, operation, wrong)
    store = choices.Choices()
    with torch.no_grad():
        FusedTraining(network("resnet18"), torch.float64, backend="reference", choices=store)(draw(8, 3, 16, 16))
    taken = {"forward": set(), "backward": set()}
    for key, name in store.record().items():
        # Blocks with fewer values per channel are not compared, and the stem has no dgrad.
        if ("|8x16x16x" in key or "|8x8x8x" in key) and "|nothing|" not in key:
            taken[key.rpartition("|")[2].split()[0]].add(name)
    assert taken["forward"] == ({CUDNN} if faulty and operation == "conv_forward" else {CHAIN})
    spared = {"conv_forward": {CHAIN}, "conv_dgrad": {CUDNN}, "conv_dgrad_joined": {paths.APART}, "conv_wgrad": {paths.DGRAD}}
    assert taken["backward"] == (spared[operation] if faulty else {CHAIN})
    assert ("computes something else" in caplog.text) == faulty


def test_blocks_are_described_by_what_their_time_depends_on(monkeypatch):
    monkeypatch.setattr(choices, "measure", lambda runs, device: dict.fromkeys(runs, 1.0))
    keys = []
    for width, batch, dtype in ((2, 2, torch.float64), (4, 2, torch.float64), (2, 3, torch.float64), (2, 2, torch.float32)):
        store = choices.Choices()
        extractor = Extractor(build_architecture("resnet18", width=width)).to(dtype)
        with torch.no_grad():
            FusedTraining(extractor, dtype, backend="reference", choices=store)(draw(batch, 3, 8, 8, dtype=dtype))
        keys.append(set(store.record()))
    assert not any(keys[0] & other for other in keys[1:])
    key = min(name for name in keys[0] if "projection" in name)
    assert "|block|float64|2x8x8x2|3x3/2:4 3x3/1:4 1x1/2:4|projection|" in "".join(sorted(keys[0])), key
