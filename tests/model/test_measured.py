"""What `auto` measures: tiles per layer and direction, then paths; remembered, bounded, and without what fails or computes another thing.

On a CPU the kernels run in Triton's interpreter; times are made up, so that nothing depends on the machine.
"""

from __future__ import annotations

import copy
import logging
from functools import partial

import pytest
import torch

from der_fast.kernels import choices, triton_runtime
from der_fast.kernels.choices import Choices
from der_fast.kernels.conv import ConvShape, likely
from der_fast.kernels.conv.launch import LIKELY
from der_fast.kernels.device import multiprocessors
from der_fast.model import chain, chain_backward, measured, paths, tiles
from der_fast.model.architecture import Architecture, Block, Conv, build_architecture
from der_fast.model.chain import IDENTITY, ChainBlock, Weights
from der_fast.model.chain_backward import backward
from der_fast.model.extractor import Extractor
from der_fast.model.fused_training import FusedTraining
from der_fast.model.layout import MaskLayout
from der_fast.model.masks import ChannelMasks
from der_fast.model.measured import fastest_block
from der_fast.model.paths import CHAIN, CUDNN, EPILOGUE, PYTORCH, Layer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK = ChainBlock((Layer(3, 1), Layer(1, 1)), IDENTITY, 1, "fused")
FAILURES = {
    "does not compile": RuntimeError("PTX was compiled with an unsupported toolchain.\nptxas: and more"),
    "does not fit": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB"),
}


def draw(*shape, seed=0):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return drawn.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else drawn


def batch():
    """A block's input and weights: 35 columns, so that there are tiles to choose from."""
    vectors = [[1 + 0.1 * draw(size, seed=seed) for seed in range(3)] for size in (35, 3)]
    convs = [draw(35, 3, 3, 3, seed=5), draw(3, 35, 1, 1, seed=6)]
    return draw(2, 3, 5, 6).relu(), [Weights(conv, *vector) for conv, vector in zip(convs, vectors, strict=True)]


@pytest.fixture
def times(monkeypatch):
    """Let the last tiles that are offered be the fastest, and of the paths the one that is asked for; returns what was measured."""
    found = []

    def favour(path):
        def measure(runs, device):
            found.append(list(runs))
            return {name: 0.5 if name == path else 10.0 - number for number, name in enumerate(runs)}

        monkeypatch.setattr(choices, "measure", measure)
        return found

    return favour


def offered(direction, transformed, shape):
    return likely(direction, shape, torch.float32, transformed=transformed, processors=multiprocessors(DEVICE))


SHAPES = ConvShape(2, 3, 5, 6, 35, 3, 1), ConvShape(2, 35, 5, 6, 3, 1, 1)


def test_tiles_are_chosen_per_layer_and_direction_and_a_second_process_measures_nothing(times, tmp_path, monkeypatch):
    found, (x, weights) = times(CHAIN), batch()
    path = tmp_path / "choices.json"
    block = fastest_block(BLOCK, x, weights, Choices(path))
    for layer, shape, first in zip(block.layers, SHAPES, (True, False), strict=True):
        # Tiles of an input as stored are compared for both: `epilogue` was a candidate.
        assert layer.tiles.forward == offered("forward", False, shape)[-1]
        assert layer.tiles.transformed == (None if first else offered("forward", True, shape)[-1])
        assert layer.tiles.dgrad == offered("dgrad", True, shape)[-1] and layer.tiles.wgrad == offered("wgrad", True, shape)[-1]
        assert (layer.forward, layer.dgrad, layer.wgrad) == (CHAIN,) * 3
    measured_tiles = [names for names in found if CUDNN not in names]
    assert len(measured_tiles) == 7 and {len(names) for names in measured_tiles} <= set(range(2, LIKELY + 1))
    assert not any("reference" in names or PYTORCH in names for names in found)
    monkeypatch.setattr(choices, "measure", lambda runs, device: pytest.fail("measured again"))
    again = fastest_block(BLOCK, x, weights, Choices(path))
    # What the chosen paths do not use is not even looked up.
    assert [layer.tiles.dgrad for layer in again.layers] == [layer.tiles.dgrad for layer in block.layers]
    assert again.layers[1].tiles.transformed == block.layers[1].tiles.transformed and again.layers[1].tiles.forward is None

    used = set()

    def watched(name, right, *args, config=None, **kwargs):
        used.add((name, config))
        return right(*args, config=config, **kwargs)

    for name in ("conv_forward", "conv_dgrad", "conv_wgrad"):
        home = chain if name == "conv_forward" else chain_backward
        monkeypatch.setattr(home, name, partial(watched, name, getattr(home, name)))
    plain = measured._on_cudnn(BLOCK)
    truth = ChainBlock(plain, IDENTITY, 1, "reference")
    results = []
    for one in (truth, block):
        out, bits, kept = chain.forward(one, x, weights)
        leaving, gradients = backward(one, weights, kept, (out, bits), True)
        results.append([out, leaving.g, *(value for layer in gradients for value in (layer.conv, layer.gamma, layer.beta, layer.mask))])
    (first, second) = (layer.tiles for layer in block.layers)
    assert used == {
        ("conv_forward", first.forward),
        ("conv_forward", second.transformed),
        *(("conv_dgrad", one.dgrad) for one in (first, second)),
        *(("conv_wgrad", one.wgrad) for one in (first, second)),
    }
    for wanted, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_no_tiles_are_measured_for_paths_that_are_known_to_do_without(times, tmp_path):
    path, (x, weights) = tmp_path / "choices.json", batch()
    times(CUDNN)
    # Made without tiles, as by a process whose time for them was over.
    store = Choices(path)
    store._seconds = 0.0
    fastest_block(BLOCK, x, weights, store)
    second = Choices(path)
    block = fastest_block(BLOCK, x, weights, second)
    assert all(layer.tiles == paths.Tiles() for layer in block.layers)
    assert not any(key.split("kernels ")[1].split("|")[1] == "conv" for key in second.record())


def test_when_the_time_for_tiles_is_over_the_defaults_are_taken_and_remembered(times, tmp_path, monkeypatch):
    monkeypatch.setattr(choices, "OPTIONAL_SECONDS", 0.0)
    found, (x, weights) = times(CHAIN), batch()
    path = tmp_path / "choices.json"
    block = fastest_block(BLOCK, x, weights, Choices(path))
    assert len(found) == 2 and all(CUDNN in names for names in found)
    assert block.layers[0].tiles.wgrad == offered("wgrad", True, SHAPES[0])[0]
    monkeypatch.setattr(choices, "OPTIONAL_SECONDS", 60.0)
    assert fastest_block(BLOCK, x, weights, Choices(path)).layers[0].tiles.wgrad == block.layers[0].tiles.wgrad
    assert len(found) == 2


@pytest.mark.parametrize("operation", ["conv_forward", "conv_dgrad", "conv_wgrad"])
def test_tiles_that_compute_something_else_are_not_taken(times, monkeypatch, caplog, operation):
    found, (x, weights) = times(CHAIN), batch()
    direction = operation.removeprefix("conv_")
    spoilt = offered(direction, True, SHAPES[1])[-1]
    right = getattr(tiles, operation)

    def wrong(*args, config=None, **kwargs):
        result = right(*args, config=config, **kwargs)
        first = result[0] if isinstance(result, tuple) else result
        if config == spoilt:
            first[:1, :2] *= 1.5
        return result

    monkeypatch.setattr(tiles, operation, wrong)
    block = fastest_block(BLOCK, x, weights, Choices())
    chosen = block.layers[1].tiles
    assert (chosen.transformed if direction == "forward" else getattr(chosen, direction)) == offered(direction, True, SHAPES[1])[-2]
    assert f"convolutions ({direction}) run in tiles of '{spoilt.name}' is not used, because it computes something else" in caplog.text
    assert len(found) == 9


@pytest.mark.parametrize(
    ("operation", "failure"),
    [
        ("conv_forward", "does not compile"),
        ("conv_forward", "does not fit"),
        ("conv_dgrad", "does not compile"),
        ("conv_wgrad", "does not fit"),
    ],
)
def test_a_kernel_that_fails_here_is_left_out_in_one_line_for_all_shapes(times, monkeypatch, caplog, operation, failure):
    times(CHAIN)

    def fail(*args, **kwargs):
        raise FAILURES[failure]

    for module in (chain if operation == "conv_forward" else chain_backward, tiles):
        monkeypatch.setattr(module, operation, fail)
    store = Choices()
    with caplog.at_level(logging.WARNING):
        for height in (4, 5):
            _, weights = batch()
            block = fastest_block(BLOCK, draw(2, 3, height, 4).relu(), weights, store)
    directions = {"conv_forward": (CUDNN, CHAIN, CHAIN), "conv_dgrad": (CHAIN, CUDNN, CUDNN), "conv_wgrad": (CHAIN, CHAIN, CUDNN)}
    assert {(layer.forward, layer.dgrad, layer.wgrad) for layer in block.layers} == {directions[operation]}
    lines = [record.getMessage() for record in caplog.records]
    names = {"conv_forward": [EPILOGUE, CHAIN], "conv_dgrad": [CHAIN, paths.DGRAD], "conv_wgrad": [CHAIN]}[operation]
    error = FAILURES[failure]
    assert [line.split("'")[1] for line in lines] == names
    assert all(line.endswith(f"failed: {type(error).__name__}: {str(error).splitlines()[0]}") for line in lines)


def small_network():
    groups = {"stream": 5, "last": 4, "a": 3, "c": 2}
    blocks = (
        Block("identity", (Conv("conv1", ("stream",), ("a",), 3), Conv("conv2", ("a",), ("stream",), 1))),
        Block(
            "projection",
            (Conv("conv1", ("stream",), ("c",), 3, 2), Conv("conv2", ("c",), ("last",), 3)),
            Conv("shortcut", ("stream",), ("last",), 1, 2),
        ),
    )
    return Architecture("small", groups, Conv("stem", (), ("stream",), 3), False, blocks)


def steps(features, extractor, masks, kernels, images):
    """Two steps of training: the losses, and everything that was trained."""
    optimizer = torch.optim.SGD([*extractor.parameters(), *masks.parameters()], 0.01)
    losses = []
    for _ in range(2):
        factors, sparsity = masks.with_sparsity(2.0, backend=kernels)
        loss = features(images, factors).square().mean() + 0.1 * sparsity
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *extractor.state_dict().values(), *masks.state_dict().values()]


@pytest.mark.parametrize("make", [small_network, lambda: build_architecture("preact_resnet18", width=2)], ids=["post", "pre"])
def test_where_no_kernel_works_training_goes_on_in_pytorch_and_one_line_says_so(make, monkeypatch, caplog, tmp_path):
    """A driver that refuses every kernel that Triton builds; the module of C++ was built without CUDA."""
    from triton.runtime.jit import KernelInterface

    def launcher(kernel, grid):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nand more")

    monkeypatch.setattr(KernelInterface, "__getitem__", launcher)
    monkeypatch.setattr("der_fast.kernels.channel_masks.measured._has_native_code", lambda device: False)
    store = Choices(tmp_path / "choices.json")
    monkeypatch.setattr("der_fast.model.masks.shared", lambda: store)
    plain = Extractor(make()).initialise(torch.Generator().manual_seed(0)).to(DEVICE).train()
    layout = MaskLayout(plain.architecture)
    masks = ChannelMasks(layout, low=-1.0, high=1.0, clamp=6.0, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ours, our_masks, images = copy.deepcopy(plain), copy.deepcopy(masks), draw(4, 3, 12, 12)
    with caplog.at_level(logging.WARNING):
        found = steps(FusedTraining(ours, torch.float32, choices=store), ours, our_masks, "auto", images)
    wanted = steps(plain, plain, masks, "reference", images)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    what = "residual blocks run forward as 'pytorch'" if make is small_network else "batch-norms before a convolution run as 'reference'"
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(", because nothing else works here: ")[0] for line in lines] == ["channel masks run as 'reference'", what]
    assert all("failed: RuntimeError: Failed to find C compiler" in line and "and more" not in line for line in lines)
    # The next run tries again: a compiler may have been installed.
    assert not (tmp_path / "choices.json").exists()


def test_batch_norms_of_preactivation_networks_run_on_kernels_that_work_and_are_timed_by_nobody(monkeypatch):
    monkeypatch.setattr(choices, "measure", lambda runs, device: pytest.fail("nothing to choose from"))
    assert triton_runtime.usable(DEVICE)[0]
    extractor = Extractor(build_architecture("preact_resnet18", width=2)).initialise(torch.Generator().manual_seed(0)).to(DEVICE).train()
    store, before = Choices(), copy.deepcopy(extractor.state_dict())
    norm = next(module for module in extractor.modules() if hasattr(module, "running_mean"))
    size = len(norm.weight)
    for mask in (None, torch.rand(size, device=DEVICE)):
        assert measured.working_normalisation(norm, draw(2, size, 17, 16), mask, store) == "fused"
    assert all(torch.equal(value, before[name]) for name, value in extractor.state_dict().items())
    assert len(store.record()) == 2
