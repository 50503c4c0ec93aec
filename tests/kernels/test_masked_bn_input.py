"""`masked_bn` and its passes refuse what they cannot do, by name; how launches are chosen."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from der_fast.errors import BackendError
from der_fast.kernels import masked_bn as passes
from der_fast.kernels import triton_runtime
from der_fast.kernels.masked_bn import launch as choose
from der_fast.kernels.masked_bn.checks import MOST_CHANNELS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = pytest.mark.parametrize("backend", ["reference", "fused"])
LAST = torch.channels_last
FULL = (2, 4, 3, 5)


def image(shape=FULL, dtype=torch.float32, layout=LAST):
    return torch.ones(shape, dtype=dtype, device=DEVICE).contiguous(memory_format=layout)


def vector(size=4, dtype=torch.float32):
    return torch.ones(size, dtype=dtype, device=DEVICE)


def affine(**changed):
    return passes.Affine(**{name: changed.get(name, vector()) for name in ("mean", "rstd", "scale", "shift")})


def whole(x=None, training=True, **changed):
    named = {"weight": vector(), "bias": vector(), "running_mean": vector(), "running_var": vector(), **changed}
    return passes.masked_bn(image() if x is None else x, **named, training=training, backend="fused")


BAD_ACTIVATIONS = [
    (lambda: image((4, 3, 5), layout=torch.contiguous_format), r"y must be \(N, C, H, W\), not of shape \(4, 3, 5\)"),
    (lambda: image(dtype=torch.int32), r"y is torch.int32; bfloat16, float16 and float32 are supported"),
    (lambda: image((0, 4, 3, 5)), r"y is empty: shape \(0, 4, 3, 5\)"),
    (lambda: image((2, 0, 3, 5)), r"y is empty: shape \(2, 0, 3, 5\)"),
    (lambda: image(layout=torch.contiguous_format), r"y must have channels-last strides, not \(60, 15, 5, 1\)"),
    (lambda: image((2, MOST_CHANNELS + 1, 1, 1)), r"channels; at most 1048576"),
]


@BACKENDS
@pytest.mark.parametrize(("make", "message"), BAD_ACTIVATIONS)
def test_activations(backend, make, message):
    with pytest.raises(ValueError, match="masked_bn: " + message if message[0] == "y" else message):
        passes.statistics(make(), backend=backend)
    with pytest.raises(ValueError, match=message):
        passes.apply(make(), (vector(), vector()), relu=True, keep_bits=False, backend=backend)


def apply(backend, scale=None, shift=None, **changed):
    vectors = (vector() if scale is None else scale, vector() if shift is None else shift)
    return passes.apply(image(), vectors, **changed, relu=True, keep_bits=False, backend=backend)


def reduce(backend, norm=None, relu_from="none", **changed):
    return passes.backward_reduce(changed.pop("g", image()), image(), norm or affine(), relu_from=relu_from, **changed, backend=backend)


BAD_CALLS = {
    "scale": (
        lambda b: passes.apply(image(), (vector(5), vector()), relu=True, keep_bits=False, backend=b),
        r"scale must have shape \(4,\), not \(5,\)",
    ),
    "shift": (
        lambda b: apply(b, vector(), vector(dtype=torch.float16)),
        "shift must be torch.float32 to fit the other tensors, not torch.float16",
    ),
    "stride": (
        lambda b: apply(b, vector(8)[::2], vector()),
        r"scale must be contiguous, not with strides \(2,\): use .contiguous",
    ),
    "device": (
        lambda b: apply(b, vector().to("meta"), vector()),
        "scale is on meta, the other tensors on",
    ),
    "residual": (
        lambda b: apply(b, residual=image((1, 4, 3, 5))),
        r"residual must have shape \(2, 4, 3, 5\), not \(1, 4, 3, 5\)",
    ),
    "residual's dtype": (
        lambda b: apply(b, residual=image(dtype=torch.bfloat16)),
        "residual must be torch.float32 to fit the other tensors, not torch.bfloat16",
    ),
    "no residual": (
        lambda b: apply(b, residual_affine=(vector(), vector())),
        "residual_affine was given without a residual",
    ),
    "partials": (lambda b: passes.finalize(torch.ones(2, 2, 4), vector(), vector(), None, 1e-5, backend=b), r"non-empty \(P, 3, C\)"),
    "no partials": (lambda b: passes.finalize(torch.ones(0, 3, 4), vector(), vector(), None, 1e-5, backend=b), r"non-empty \(P, 3, C\)"),
    "partials' dtype": (
        lambda b: passes.finalize(torch.ones(1, 3, 4).half(), vector(), vector(), None, 1e-5, backend=b),
        "partials must be contiguous and float32, not torch.float16",
    ),
    "mask": (
        lambda b: passes.finalize(torch.ones(1, 3, 4, device=DEVICE), vector(), vector(), vector(1), 1e-5, backend=b),
        r"mask must have shape \(4,\), not \(1,\)",
    ),
    "g": (
        lambda b: reduce(b, g=image((2, 4, 5, 3))),
        r"g must have shape \(2, 4, 3, 5\), not \(2, 4, 5, 3\)",
    ),
    "g's dtype": (
        lambda b: passes.backward_apply(
            image(dtype=torch.float16), image(), vector(12).view(3, 4), relu_from="none", affine=affine(), backend=b
        ),
        "g must be torch.float32 to fit the other tensors, not torch.float16",
    ),
    "relu_from": (
        lambda b: reduce(b, relu_from="sign"),
        "relu_from is 'sign'; pass 'none', 'recompute' or the bits",
    ),
    "bits": (
        lambda b: passes.backward_reduce(
            image(), image(), affine(), relu_from=torch.ones(30, 4, dtype=torch.uint8, device=DEVICE), backend=b
        ),
        r"bits must have shape \(30, 1\), not \(30, 4\)",
    ),
    "affine": (
        lambda b: reduce(b, affine(rstd=vector(3))),
        r"affine.rstd must have shape \(4,\), not \(3,\)",
    ),
    "shortcut": (
        lambda b: reduce(b, shortcut=(image((2, 4, 3, 4)), affine())),
        r"the shortcut's y must have shape \(2, 4, 3, 5\), not \(2, 4, 3, 4\)",
    ),
    "k": (
        lambda b: passes.backward_apply(image(), image(), vector(8).view(2, 4), relu_from="none", affine=affine(), backend=b),
        r"k must have shape \(3, 4\), not \(2, 4\)",
    ),
    "count": (
        lambda b: passes.backward_coefficients(torch.ones(1, 2, 4, device=DEVICE), 0, affine(), vector(), vector(), None, backend=b),
        "count is 0; it is the number of elements per channel",
    ),
}


@BACKENDS
@pytest.mark.parametrize("name", BAD_CALLS)
def test_passes(backend, name):
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(backend)


def test_unknown_backend():
    with pytest.raises(ValueError, match="unknown backend 'triton': choose from reference, fused"):
        passes.statistics(image(), backend="triton")
    with pytest.raises(ValueError, match="unknown backend 'auto'"):
        passes.masked_bn(image(), *(vector() for _ in range(4)), backend="auto")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": image((4, 3, 5), layout=torch.contiguous_format)}, r"x must be \(N, C, H, W\)"),
        ({"x": image(dtype=torch.int8)}, "x is torch.int8"),
        ({"x": image((1, 4, 1, 1))}, r"x of shape \(1, 4, 1, 1\) has 1 element\(s\) per channel; training needs 2 or more"),
        ({"x": image((0, 4, 3, 5))}, r"x of shape \(0, 4, 3, 5\) has 0 element\(s\) per channel"),
        ({"weight": vector(3)}, r"weight must have shape \(4,\), not \(3,\)"),
        ({"bias": vector(dtype=torch.bfloat16)}, "bias must be torch.float32 to fit the other tensors, not torch.bfloat16"),
        ({"mask": vector(1)}, r"mask must have shape \(4,\), not \(1,\)"),
        ({"running_var": vector(5)}, r"running_var must have shape \(4,\), not \(5,\)"),
        ({"residual": image((2, 4, 3, 4))}, r"residual must have shape \(2, 4, 3, 5\), not \(2, 4, 3, 4\)"),
        ({"residual": image(dtype=torch.bfloat16)}, "residual must be torch.float32 to fit the other tensors, not torch.bfloat16"),
        ({"residual": torch.ones(FULL, device="meta")}, "residual is on meta, the other tensors on"),
        ({"mask": torch.ones(4, device="meta")}, "mask is on meta, the other tensors on"),
        ({"running_mean": torch.ones(4, device="meta")}, "running_mean is on meta"),
    ],
)
def test_the_whole_operation(arguments, message):
    with pytest.raises(ValueError, match="masked_bn: .*" + message):
        whole(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": vector(1)}, r"masked_bn: mask must have shape \(4,\), not \(1,\)"),
        ({"residual": image((1, 4, 3, 5))}, r"masked_bn: residual must have shape \(2, 4, 3, 5\), not \(1, 4, 3, 5\)"),
    ],
)
def test_the_reference_repeats_nothing_silently(arguments, message):
    with pytest.raises(ValueError, match=message):
        passes.masked_bn(image(), *(vector() for _ in range(4)), training=True, **arguments)


def test_one_element_per_channel_is_refused_by_the_reference_too():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        passes.masked_bn(image((1, 4, 1, 1)), *(vector() for _ in range(4)), training=True)
    assert whole(image((1, 4, 1, 1)), training=False).shape == (1, 4, 1, 1)


@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (2, 0, 3, 5)])
def test_nothing_in_evaluation_mode_is_nothing(shape):
    none = {name: vector(shape[1]) for name in ("weight", "bias", "running_mean", "running_var")}
    assert whole(image(shape), training=False, **none).shape == shape
    if shape[1] == 0:
        assert whole(image(shape), training=True, **none).shape == shape


@pytest.mark.parametrize("message", ["Triton is not installed", "needs a newer GPU"])
def test_fused_where_it_cannot_run(monkeypatch, message):
    monkeypatch.setattr(triton_runtime, "usable", lambda device: (False, message))
    with pytest.raises(BackendError, match=f"masked_bn cannot run here: {message}.*'reference' or 'auto'"):
        whole()
    with pytest.raises(BackendError, match="masked_bn cannot run here"):
        passes.statistics(image(), backend="fused")
    assert passes.statistics(image(), backend="reference").shape == (1, 3, 4)


def test_importing_brings_no_triton():
    command = "import sys, der_fast.kernels.masked_bn; sys.exit('triton' in sys.modules or 'torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], timeout=120).returncode == 0


@pytest.mark.parametrize("channels", [1, 3, 8, 17, 64, 96, 130, 512, 4095, 4097, MOST_CHANNELS])
@pytest.mark.parametrize("rows", [1, 105, 1024, 524288, 2**33])
@pytest.mark.parametrize("foldable", [True, False])
def test_launches_cover_the_tensor_and_stay_within_limits(channels, rows, foldable):
    view = choose.view(rows, channels, foldable)
    assert view.rows * view.width == rows * channels and view.width == channels * view.fold
    if foldable and rows % 64 == 0 and channels <= 4096:
        assert view.width % 64 == 0
    for cut in (choose.elementwise(view, 132), *(choose.reduction(view, 132, resident) for resident in (4, 7))):
        programs, blocks = choose.grid(view, cut)
        assert programs * cut.tiles * cut.block_rows >= view.rows > (programs - 1) * cut.tiles * cut.block_rows
        assert blocks * cut.block_columns >= view.width
        # Offsets inside a tile are 32-bit; a launch has at most 2³¹ − 1 and 65535 programs along its axes.
        assert cut.block_rows * view.width < 2**31 and programs < 2**31 and blocks <= 65535
        assert all(16 <= size <= 256 and size & (size - 1) == 0 for size in (cut.block_rows, cut.block_columns))
        assert cut.block_rows * cut.block_columns <= 4096
    assert programs * blocks <= 132 * 7 + 65535
