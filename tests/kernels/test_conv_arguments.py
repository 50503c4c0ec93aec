"""What the convolutions refuse, by name; and how they are cut into tiles."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from der_fast.errors import BackendError
from der_fast.kernels import triton_runtime
from der_fast.kernels.conv import ConvShape, ConvTiles, candidates, conv_dgrad, conv_forward, conv_wgrad, default_config, default_split
from der_fast.kernels.conv.launch import SHARED, wgrad_tiles
from der_fast.kernels.conv.shape import unit_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIRECTIONS = ("forward", "dgrad", "wgrad")


def image(*size: int) -> Tensor:
    return torch.ones(size, device=DEVICE).contiguous(memory_format=torch.channels_last)


def vector(*size: int) -> Tensor:
    return torch.ones(size, device=DEVICE)


def arguments(call) -> dict[str, object]:
    """What fits: 6 channels of 5×4, 8 filters of 3×3; forward with stride 1, the gradients with stride 2."""
    pair, g = (vector(6), vector(6)), image(2, 8, 3, 2)
    if call is conv_forward:
        return {"x": image(2, 6, 5, 4), "weight": image(8, 6, 3, 3), "stride": 1, "prologue": pair, "statistics": False}
    if call is conv_dgrad:
        affine = SimpleNamespace(mean=vector(6), rstd=vector(6), scale=vector(6), shift=vector(6))
        pairs = {"g_affine": (vector(3, 8), image(2, 8, 3, 2)), "epilogue": (image(2, 6, 5, 4), affine)}
        return pairs | {"g": g, "weight": image(8, 6, 3, 3), "input_hw": (5, 4), "stride": 2}
    return {"x": image(2, 6, 5, 4), "g": g, "kernel": 3, "stride": 2, "prologue": pair, "g_affine": (vector(3, 8), image(2, 8, 3, 2))}


def refused(call, changes: dict[str, object], message: str) -> None:
    """A change is another value, or a function of the one that fits."""
    given = arguments(call)
    for name, change in changes.items():
        given[name] = change(given.get(name)) if callable(change) else change
    with pytest.raises(ValueError, match=message):
        call(**given)


def crop(tensor: Tensor) -> Tensor:
    return tensor[:, :-1].contiguous(memory_format=torch.channels_last if tensor.dim() == 4 else torch.contiguous_format)


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": lambda x: x.contiguous()}, "x must have channels-last strides.*memory_format"),
        ({"x": lambda x: x[0]}, r"x must be \(N, C, H, W\), not of shape \(6, 5, 4\)"),
        ({"x": lambda x: x[:0]}, r"x is empty: shape \(0, 6, 5, 4\)"),
        ({"x": lambda x: x.int()}, "takes torch.float32, torch.bfloat16, torch.float16.* not torch.int32"),
        ({"x": crop}, r"weight \(8, 6, 3, 3\) takes 6 channels, but x has 5"),
        ({"weight": lambda w: w.half()}, "weight must be torch.float32 to fit the other tensors, not torch.float16"),
        ({"weight": lambda w: w.contiguous()}, "weight must have channels-last strides"),
        ({"weight": lambda w: w[:, :, :2, :2].contiguous(memory_format=torch.channels_last)}, "must be 1×1 or 3×3"),
        ({"weight": lambda w: w.to("meta")}, "weight is on meta, the other tensors on"),
        ({"stride": 3}, "stride must be 1 or 2, not 3"),
        ({"prologue": lambda p: (p[0][:-1], p[1])}, r"prologue scale must have shape \(6,\), not \(5,\)"),
        ({"prologue": lambda p: (p[0], p[1].double())}, "prologue shift must be torch.float32 to fit the other tensors, not torch.float64"),
        ({"prologue": lambda p: (p[0].repeat(2)[::2], p[1])}, "prologue scale must be contiguous"),
        ({"prologue": lambda p: (p[0], p[1].to("meta"))}, "prologue shift is on meta, the other tensors on"),
    ],
)
def test_forward_refuses(changes, message, backend):
    refused(conv_forward, changes | {"backend": backend}, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"g": lambda g: g[:0]}, r"g is empty: shape \(0, 8, 3, 2\)"),
        ({"g": lambda g: g.contiguous()}, "g must have channels-last strides"),
        ({"g": lambda g: g.int()}, "takes torch.float32, torch.bfloat16, torch.float16.* not torch.int32"),
        ({"weight": lambda w: w.half()}, "weight must be torch.float32 to fit the other tensors"),
        ({"weight": lambda w: w.to("meta")}, "weight is on meta"),
        ({"g": crop}, r"weight \(8, 6, 3, 3\) produces 8 channels, but g has 7"),
        ({"input_hw": (5, 5)}, r"g has height and width \(3, 2\), but an input of \(5, 5\) with stride 2 gives \(3, 3\)"),
        ({"input_hw": (0, 4)}, "height and width"),
        ({"g_affine": lambda a: (a[0][:2], a[1])}, r"g_affine k must have shape \(3, 8\)"),
        ({"g_affine": lambda a: (a[0], a[1].contiguous())}, "g_affine y must have channels-last strides"),
        ({"epilogue": lambda e: (crop(e[0]), e[1])}, r"epilogue y_in must have shape \(2, 6, 5, 4\)"),
        ({"epilogue": lambda e: (e[0], SimpleNamespace(**{**vars(e[1]), "rstd": e[1].rstd[1:]}))}, "epilogue rstd must have shape"),
    ],
)
def test_dgrad_refuses(changes, message):
    refused(conv_dgrad, changes, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"g": lambda g: g[:1]}, "g has batch size 1, x has 2"),
        ({"g": lambda g: g.half()}, "g must be torch.float32 to fit the other tensors"),
        ({"g": lambda g: g.to("meta")}, "g is on meta"),
        ({"x": lambda x: x.contiguous()}, "x must have channels-last strides"),
        ({"x": lambda x: x[:0]}, r"x is empty: shape \(0, 6, 5, 4\)"),
        ({"x": lambda x: x.int()}, "takes torch.float32, torch.bfloat16, torch.float16.* not torch.int32"),
        ({"g_affine": lambda a: (a[0].to("meta"), a[1])}, "g_affine k is on meta"),
        ({"kernel": 5}, "kernel must be 1 or 3, not 5"),
        ({"stride": 1}, "g has height and width"),
        ({"split": 0}, "split must be from 1 to 65535, not 0"),
        ({"split": 65536}, "split must be from 1 to 65535, not 65536"),
    ],
)
def test_wgrad_refuses(changes, message):
    refused(conv_wgrad, changes, message)


def test_backends():
    assert conv_forward(**arguments(conv_forward))[0].shape == (2, 8, 5, 4)
    for call in (conv_forward, conv_dgrad, conv_wgrad):
        refused(call, {"backend": "cuda"}, "unknown backend 'cuda': choose from reference, fused")
    doubled = {"x": lambda x: x.double(), "backend": "fused"}
    refused(conv_forward, doubled, "backend 'fused' takes torch.float32, torch.bfloat16, torch.float16, not torch.float64")


@pytest.mark.parametrize("call", [conv_forward, conv_dgrad, conv_wgrad])
def test_fused_says_why_it_cannot_run(call, monkeypatch):
    monkeypatch.setattr(triton_runtime, "usable", lambda device: (False, "Triton is not installed"))
    with pytest.raises(BackendError, match="cannot run here: Triton is not installed. Use backend 'reference'"):
        call(**arguments(call), backend="fused")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_m": 48}, "block_m must be a power of two from 16 to 256, not 48"),
        ({"block_n": 8}, "block_n must be a power of two from 16"),
        ({"block_k": 512}, "block_k must be a power of two"),
        ({"num_warps": 3}, "num_warps must be a power of two from 1 to 16, not 3"),
        ({"num_stages": 0}, "num_stages and group must be at least 1, not 0 and 1"),
    ],
)
def test_tiles_that_no_kernel_takes(change, message):
    with pytest.raises(ValueError, match=message):
        ConvTiles(**{"block_m": 64, "block_n": 64, "block_k": 32} | change)


# ResNet-18's stages on 32×32, its stem and shortcuts; and widths as compaction leaves them.
WIDTHS = [
    (3, 64, 32, 3, 1),
    (64, 64, 32, 3, 1),
    (64, 128, 32, 3, 2),
    (64, 128, 32, 1, 2),
    (512, 512, 4, 3, 1),
    (18, 37, 16, 3, 1),
    (1, 1, 1, 1, 1),
]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_candidates(direction, transformed, dtype):
    for channels, filters, size, kernel, stride in WIDTHS:
        shape = ConvShape(128, channels, size, size, filters, kernel, stride)
        found = candidates(direction, shape, dtype, transformed=transformed)
        assert found[0] == default_config(direction, shape, dtype, transformed=transformed)
        assert len(found) == len(set(found)) <= 11
        assert all(config.shared(dtype.itemsize, transformed) <= SHARED for config in found)


def test_default_tiles_fill_the_gpu_and_do_not_pad_much():
    wide, deep = ConvShape(512, 64, 32, 32, 64, 3, 1), ConvShape(128, 512, 4, 4, 512, 3, 1)
    assert default_config("forward", wide) == ConvTiles(128, 64, 64, num_warps=8)
    # 2048 rows and 512 columns: only small tiles are at least as many as multiprocessors.
    assert (2048 // default_config("forward", deep).block_m) * (512 // default_config("forward", deep).block_n) >= 132
    assert default_config("forward", ConvShape(512, 18, 32, 32, 18, 3, 1)).block_n == 32
    assert default_config("forward", ConvShape(512, 18, 32, 32, 18, 3, 1)).flat
    assert not default_config("dgrad", wide).flat
    # A product of warp groups has 64 rows, whatever the number of filters.
    assert default_config("wgrad", ConvShape(512, 18, 32, 32, 18, 3, 1)).block_m == 64
    # Nothing more fits beside 128 × 128 sums and an operand that is formed, so dgrad takes the whole depth.
    large = ConvShape(512, 256, 8, 8, 256, 3, 1)
    assert [default_config(direction, large, transformed=True).block_k for direction in ("forward", "dgrad", "wgrad")] == [32, 64, 32]
    with pytest.raises(ValueError, match="direction must be one of forward, dgrad, wgrad, not 'backward'"):
        default_config("backward", wide)


def test_wgrad_is_cut_until_the_gpu_is_full():
    wide, tiny = ConvShape(512, 64, 32, 32, 64, 3, 1), ConvShape(1, 64, 2, 2, 64, 3, 1)
    config = default_config("wgrad", wide)
    assert 132 <= default_split(wide, config) * wgrad_tiles(wide, config) <= 264
    assert default_split(tiny, config) == 1
    large = ConvShape(512, 256, 8, 8, 256, 3, 1)
    for transformed, least, most in ((False, 132, 264), (True, 66, 132)):
        config = default_config("wgrad", large, transformed=transformed)
        assert least <= default_split(large, config, transformed=transformed) * wgrad_tiles(large, config) <= most


def test_units():
    assert [unit_of(channels) for channels in (1, 3, 18, 24, 64, 37, 12)] == [1, 1, 2, 8, 16, 1, 4]
