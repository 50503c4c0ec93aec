"""The ragged grouped convolution on a GPU: real widths, large tensors, CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from der_fast.kernels.grouped_conv import GroupedTiles, GroupMember, grouped_conv, pack_layer, padded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
CUDA = torch.device("cuda")
# What pruning leaves of ResNet-18's layers, extractor by extractor; one lost its branch.
INPUTS, OUTPUTS = [61, 30, 0, 128, 9, 17, 256, 40, 64, 1], [64, 33, 50, 130, 12, 17, 257, 41, 64, 3]


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def layer_of(inputs, outputs, dtype, *, kernel=3, stride=1, relu=True, residual=True, seed=0):
    """The layer in `dtype`, the same from the rounded weights in float64, and its channels of input and result."""
    draw = torch.Generator(CUDA).manual_seed(seed)
    parts, source, target = [], 0, 0
    for narrow, wide in zip(inputs, outputs, strict=True):
        weight = torch.randn(wide, narrow, kernel, kernel, generator=draw, device=CUDA) / (kernel * max(narrow, 1) ** 0.5)
        bias = torch.randn(wide, generator=draw, device=CUDA)
        rounded = weight.to(dtype).double() if narrow else None
        parts.append(GroupMember(rounded, bias, source, target, wide, target if residual else 0, wide if residual else 0))
        source, target = source + padded(narrow), target + padded(wide)
    options = {"kernel": kernel, "stride": stride, "relu": relu, "inputs": source, "device": CUDA}
    return pack_layer(parts, dtype=dtype, **options), pack_layer(parts, dtype=torch.float64, **options)


def activation(widths, dtype, images=64, size=16, seed=1):
    """Random channels, with zeros where they are padded."""
    draw = torch.Generator(CUDA).manual_seed(seed)
    parts = []
    for width in widths:
        part = torch.zeros(images, padded(width), size, size, device=CUDA, dtype=dtype)
        part[:, :width] = torch.randn(images, width, size, size, generator=draw, device=CUDA).to(dtype)
        parts.append(part)
    return channels_last(torch.cat(parts, 1))


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_real_widths(dtype, kernel, stride, pool):
    layer, exact = layer_of(INPUTS, OUTPUTS, dtype, kernel=kernel, stride=stride)
    x, added = activation(INPUTS, dtype), activation(OUTPUTS, dtype, size=16 // stride, seed=2)
    expected = grouped_conv(x.double(), exact, residual=added.double(), pool=pool)
    for config in (None, GroupedTiles(64, 32, 32), GroupedTiles(128, 128, 64, num_warps=8)):
        found = grouped_conv(x, layer, residual=added, pool=pool, backend="fused", config=config).double()
        # One rounding of the result; the features are not rounded. Sums of 2304 products: tensor cores cut off, rather than round, the
        # end of each of the 144 sums of 16 products, and all in one direction.
        bound = 144 * 2.0**-23 if pool or dtype == torch.float32 else torch.finfo(dtype).eps
        assert float((found - expected).abs().max()) <= bound * float(expected.abs().max())


@pytest.mark.parametrize("kernel", [3, 7])
def test_stem(kernel):
    _, exact = layer_of([3], [640], torch.bfloat16, kernel=kernel, stride=2, residual=False)
    # Three channels of an image are not padded.
    parts = [GroupMember(exact.weight(exact.entries[0])[:, :3], exact.bias, 0, 0, 640)]
    options = {"kernel": kernel, "stride": 2, "relu": True, "inputs": 3, "device": CUDA}
    x = channels_last(torch.randn(64, 3, 33, 31, device=CUDA, generator=torch.Generator(CUDA).manual_seed(0)).bfloat16())
    found = grouped_conv(x, pack_layer(parts, dtype=torch.bfloat16, **options), backend="fused").double()
    expected = grouped_conv(x.double(), pack_layer(parts, dtype=torch.float64, **options))
    assert float((found - expected).abs().max()) <= torch.finfo(torch.bfloat16).eps * float(expected.abs().max())


def test_tf32_is_asked_for():
    layer, exact = layer_of([64], [64], torch.float32, residual=False)
    x = activation([64], torch.float32)
    expected = grouped_conv(x.double(), exact)
    errors = [float((grouped_conv(x, layer, tf32=tf32, backend="fused") - expected).abs().max()) for tf32 in (False, True)]
    largest = float(expected.abs().max())
    # 11 bits of each factor are left, of which a sum of 576 products loses a little less; float32 has 24.
    assert errors[0] <= 2.0**-18 * largest and 2.0**-15 * largest <= errors[1] <= 2.0**-8 * largest


def test_more_than_two_to_the_31_elements():
    # 64 · 64 pixels × 1024 channels: the last images begin behind element 2³¹.
    layer, _ = layer_of([8, 1000, 16], [16, 500, 508], torch.bfloat16, kernel=1)
    images = 2**31 // (64 * 64 * 1024) + 2
    x = torch.zeros(images, 1024, 64, 64, device=CUDA, dtype=torch.bfloat16, memory_format=torch.channels_last)
    last = activation([8, 1000, 16], torch.bfloat16, images=2, size=64)
    x[-2:] = last
    assert layer.outputs == 1032
    added = torch.zeros(images, 1032, 64, 64, device=CUDA, dtype=torch.bfloat16, memory_format=torch.channels_last)
    added[-2:] = activation([16, 500, 508], torch.bfloat16, images=2, size=64, seed=2)
    expected = grouped_conv(last, layer, residual=channels_last(added[-2:]), backend="fused")
    assert torch.equal(grouped_conv(x, layer, residual=added, backend="fused")[-2:], expected)


def test_the_same_bits_twenty_times():
    layer, _ = layer_of(INPUTS, OUTPUTS, torch.bfloat16)
    x, added = activation(INPUTS, torch.bfloat16), activation(OUTPUTS, torch.bfloat16, seed=2)
    for pool in (False, True):
        first = grouped_conv(x, layer, residual=added, pool=pool, backend="fused")
        for _ in range(20):
            assert torch.equal(grouped_conv(x, layer, residual=added, pool=pool, backend="fused"), first)


def test_a_graph_reads_what_lies_in_its_input():
    layer, _ = layer_of(INPUTS, OUTPUTS, torch.bfloat16, residual=False)
    static, other = activation(INPUTS, torch.bfloat16), activation(INPUTS, torch.bfloat16, seed=3)
    expected = [grouped_conv(x, layer, pool=True, backend="fused") for x in (static, other)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = grouped_conv(static, layer, pool=True, backend="fused")
    graph.replay()
    assert torch.equal(found, expected[0])
    static.copy_(other)
    graph.replay()
    assert torch.equal(found, expected[1]) and not torch.equal(*expected)
