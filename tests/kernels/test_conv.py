"""Convolutions with their prologues and epilogues: the reference against autograd, the fused kernels against float64."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from der_fast.kernels import masked_bn as passes
from der_fast.kernels.conv import ConvShape, ConvTiles, conv_dgrad, conv_forward, conv_wgrad

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_GPU = not torch.cuda.is_available()
# Small enough that every shape below has several tiles or several steps.
TILES = ConvTiles(32, 32, 64, num_warps=4, num_stages=2, group=2)
FLAT = ConvTiles(64, 32, 64, num_warps=4, num_stages=2, flat=True)
# N, C, H, W, K, R, stride: odd sizes, one image, one channel, one pixel, channels beyond a block.
SHAPES = [
    (ConvShape(2, 3, 5, 7, 18, 3, 1), FLAT),
    (ConvShape(1, 17, 5, 3, 37, 3, 1), TILES),
    (ConvShape(3, 64, 3, 4, 3, 3, 1), TILES),
    (ConvShape(1, 130, 3, 2, 1, 3, 1), FLAT),
    (ConvShape(2, 1, 5, 4, 17, 3, 2), FLAT),
    (ConvShape(3, 17, 5, 5, 64, 3, 2), TILES),
    (ConvShape(1, 130, 1, 1, 18, 3, 2), TILES),
    (ConvShape(2, 18, 4, 7, 130, 3, 2), FLAT),
    (ConvShape(5, 64, 3, 5, 17, 1, 1), TILES),
    (ConvShape(2, 130, 5, 4, 3, 1, 2), FLAT),
    (ConvShape(1, 3, 4, 1, 64, 1, 2), TILES),
]
IDS = [f"{s.kernel}x{s.kernel}s{s.stride}-{s.channels}to{s.filters}" for s, _ in SHAPES]
EVERY = pytest.mark.parametrize(("shape", "config"), SHAPES, ids=IDS)


@pytest.fixture(autouse=True)
def poisoned():
    """What torch.empty returns is NaN, so that whatever a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3, device=DEVICE).isnan().all()
    # Eager's error is the measure: TensorFloat-32, cuDNN's default, would allow ours a thousand times more than float32 does.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.use_deterministic_algorithms(before)


@dataclass
class Case:
    """Everything that the three convolutions of one shape may take; float64 values that the dtype under test holds exactly."""

    shape: ConvShape
    x: Tensor
    weight: Tensor
    g: Tensor
    y: Tensor
    scale: Tensor
    shift: Tensor
    k: Tensor
    affine: SimpleNamespace

    def as_dtype(self, dtype: torch.dtype) -> Case:
        """Activations and weight in `dtype`; coefficients in float32, or float64 beside float64."""
        narrow = torch.float64 if dtype == torch.float64 else torch.float32
        images = {name: getattr(self, name).to(dtype) for name in ("x", "weight", "g", "y")}
        vectors = {name: getattr(self, name).to(narrow) for name in ("scale", "shift", "k")}
        affine = SimpleNamespace(**{name: value.to(narrow) for name, value in vars(self.affine).items()})
        return Case(self.shape, **images, **vectors, affine=affine)

    def magnitudes(self, **used: bool) -> Case:
        """The same with absolute values: its results bound the sums of the magnitudes that are added up."""
        names = ("x", "weight", "g", "y", "scale", "shift", "k")
        return Case(self.shape, *(getattr(self, name).abs() for name in names), affine=self.affine)


def draw(shape: ConvShape, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = DEVICE) -> Case:
    """Random arguments. The shift is positive on average: what is padded before it instead of after it shows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        value = torch.randn(*size, generator=generator).to(dtype if len(size) == 4 else torch.float32).to(device, torch.float64)
        return value.contiguous(memory_format=torch.channels_last) if len(size) == 4 else value

    s = shape
    inside, outside = (s.batch, s.channels, s.height, s.width), (s.batch, s.filters, s.out_height, s.out_width)
    scale, shift = normal(s.channels), normal(s.channels) + 1
    return Case(
        shape=shape,
        x=normal(*inside),
        weight=normal(s.filters, s.channels, s.kernel, s.kernel),
        g=normal(*outside),
        y=normal(*outside),
        scale=scale,
        shift=shift,
        k=normal(3, s.filters),
        affine=SimpleNamespace(mean=normal(s.channels), rstd=normal(s.channels).abs() + 0.5, scale=scale, shift=shift),
    )


def bound(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """What may be lost: two roundings to `dtype` (operand and result), and float32 sums off by a few units of their magnitudes."""
    return magnitude * (2 * torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps)


def assert_close(ours: Tensor, eager: Tensor, truth: Tensor, floor: Tensor) -> None:
    """Our error is at most twice that of plain eager PyTorch or, where that is more, the floor."""
    error, theirs = (ours.double() - truth).abs(), (eager.double() - truth).abs().max()
    allowed = torch.maximum(2 * theirs, floor)
    # Written so that a NaN fails.
    assert bool((error <= allowed).all()), f"error up to {error.max():.3g}, eager's {theirs:.3g}, allowed at least {allowed.min():.3g}"


def merged(partials: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and M2 of all blocks together, in float64."""
    count, mean, m2 = partials.double().unbind(1)
    total = count.sum(0)
    centre = (count * mean).sum(0) / total
    return total, centre, (m2 + count * (mean - centre) ** 2).sum(0)


def moments(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and M2 of an activation, in float64."""
    rows = y.double().movedim(1, -1).flatten(0, -2)
    mean = rows.mean(0)
    return torch.full_like(mean, len(rows)), mean, ((rows - mean) ** 2).sum(0)


def column(vector: Tensor) -> Tensor:
    return vector.reshape(1, -1, 1, 1)


def forward(case: Case, backend: str = "reference", config: ConvTiles | None = None, **changes):
    options = {"prologue": (case.scale, case.shift), "statistics": True}
    return conv_forward(case.x, case.weight, stride=case.shape.stride, config=config, backend=backend, **options | changes)


def dgrad(case: Case, backend: str = "reference", config: ConvTiles | None = None, **changes):
    options = {"g_affine": (case.k, case.y), "epilogue": (case.x, case.affine)} | changes
    size = (case.shape.height, case.shape.width)
    return conv_dgrad(case.g, case.weight, size, stride=case.shape.stride, config=config, backend=backend, **options)


def wgrad(case: Case, backend: str = "reference", config: ConvTiles | None = None, **changes):
    options = {"prologue": (case.scale, case.shift), "g_affine": (case.k, case.y)} | changes
    return conv_wgrad(case.x, case.g, case.shape.kernel, stride=case.shape.stride, config=config, backend=backend, **options)


@EVERY
def test_reference_equals_autograd(shape, config):
    case = draw(shape).as_dtype(torch.float64)
    z = (case.x * column(case.scale) + column(case.shift)).requires_grad_()
    weight = case.weight.clone().requires_grad_()
    y = F.conv2d(z.relu(), weight, stride=shape.stride, padding=shape.kernel // 2)
    upstream = column(case.k[0]) * case.g + column(case.k[1]) * case.y + column(case.k[2])
    for_z, for_weight = torch.autograd.grad(y, (z, weight), upstream)

    out, partials = forward(case)
    exact = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(out, y.detach(), **exact)
    for ours, theirs in zip(merged(partials), moments(out), strict=True):
        torch.testing.assert_close(ours, theirs, **exact)
    g_z, sums = dgrad(case)
    torch.testing.assert_close(g_z, for_z, **exact)
    normalised = (case.x - column(case.affine.mean)) * column(case.affine.rstd)
    torch.testing.assert_close(sums.sum(0), torch.stack([for_z.sum((0, 2, 3)), (for_z * normalised).sum((0, 2, 3))]), **exact)
    torch.testing.assert_close(wgrad(case), for_weight, **exact)


def check_forward(case: Case, config: ConvTiles | None, dtype: torch.dtype, **changes) -> None:
    truth, _ = forward(case, **changes)
    magnitude, _ = forward(case.magnitudes(), **changes)
    narrow = case.as_dtype(dtype)
    eager, _ = forward(narrow, **changes)
    ours, partials = forward(narrow, "fused", config, **changes)
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
    assert_close(ours, eager, truth, bound(magnitude, dtype))
    if partials is None:
        return
    # Of the values as stored: nothing but float32 sums lies between.
    unit = 8 * torch.finfo(torch.float32).eps
    count, mean, m2 = merged(partials)
    true_count, true_mean, true_m2 = moments(ours)
    assert torch.equal(count, true_count)
    assert bool(((mean - true_mean).abs() <= unit * ours.double().abs().mean((0, 2, 3))).all())
    # A block's mean is rounded, and its distance from the other means with it; E[y²] − E[y]² would lose the square of the mean.
    assert bool(((m2 - true_m2).abs() <= unit * (true_m2 + (true_m2 * count).sqrt() * true_mean.abs() + unit * count * true_mean**2)).all())


def check_dgrad(case: Case, config: ConvTiles | None, dtype: torch.dtype, **changes) -> None:
    truth, _ = dgrad(case, **changes)
    magnitude, _ = dgrad(case.magnitudes(), **{**changes, "epilogue": None})
    narrow = case.as_dtype(dtype)
    eager, _ = dgrad(narrow, **changes)
    ours, partials = dgrad(narrow, "fused", config, **changes)
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
    assert_close(ours, eager, truth, bound(magnitude, dtype))
    if partials is None:
        return
    normalised = (case.x - column(case.affine.mean)) * column(case.affine.rstd)
    stored, sums = ours.double(), partials.double().sum(0)
    for ours_sum, terms in zip(sums, (stored, stored * normalised), strict=True):
        error = (ours_sum - terms.sum((0, 2, 3))).abs()
        scale = (stored.abs() * (normalised.abs() + column(case.affine.mean * case.affine.rstd).abs() + 1)).sum((0, 2, 3))
        assert bool((error <= 8 * torch.finfo(torch.float32).eps * scale).all())


def check_wgrad(case: Case, config: ConvTiles | None, dtype: torch.dtype, **changes) -> None:
    truth, magnitude = wgrad(case, **changes), wgrad(case.magnitudes(), **changes)
    narrow = case.as_dtype(dtype)
    ours = wgrad(narrow, "fused", config, **changes)
    assert ours.dtype == torch.float32 and ours.is_contiguous(memory_format=torch.channels_last)
    assert_close(ours, wgrad(narrow, **changes), truth, bound(magnitude, dtype))


@EVERY
def test_fused_forward(shape, config):
    check_forward(draw(shape), config, torch.float32)


@EVERY
@pytest.mark.filterwarnings("error::RuntimeWarning")  # a division by the size of an empty parity class
def test_fused_dgrad(shape, config):
    check_dgrad(draw(shape), config, torch.float32)


@EVERY
def test_fused_wgrad(shape, config):
    check_wgrad(draw(shape), config, torch.float32, split=2)


# The interpreter cuts float32 down to bfloat16 instead of rounding it, so there bfloat16 is tested below where nothing is rounded.
@pytest.mark.parametrize("dtype", [torch.float16] if NO_GPU else [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("number", [1, 7, 9])
def test_fused_in_half_precision(number, dtype):
    shape, config = SHAPES[number]
    case = draw(shape, dtype)
    check_forward(case, config, dtype)
    check_dgrad(case, config, dtype)
    check_wgrad(case, config, dtype, split=3)


@pytest.mark.parametrize(
    "changes", [{"prologue": None, "statistics": False}, {"prologue": None}, {"statistics": False}], ids=["plain", "sums", "prologue"]
)
def test_forward_with_less_around_it(changes):
    check_forward(draw(ConvShape(2, 17, 5, 4, 5, 3, 1), seed=1), TILES, torch.float32, **changes)


@pytest.mark.parametrize(
    "changes", [{"g_affine": None}, {"epilogue": None}, {"g_affine": None, "epilogue": None}], ids=["epilogue", "affine", "plain"]
)
@pytest.mark.parametrize("stride", [1, 2])
def test_dgrad_with_less_around_it(changes, stride):
    check_dgrad(draw(ConvShape(2, 17, 5, 4, 5, 3, stride), seed=2), TILES, torch.float32, **changes)


@pytest.mark.parametrize(
    "changes", [{"g_affine": None}, {"prologue": None}, {"g_affine": None, "prologue": None}], ids=["prologue", "affine", "plain"]
)
def test_wgrad_with_less_around_it(changes):
    check_wgrad(draw(ConvShape(2, 17, 5, 4, 5, 3, 1), seed=3), TILES, torch.float32, split=2, **changes)


def test_default_tiles():
    shape = ConvShape(2, 24, 3, 4, 40, 3, 2)
    case = draw(shape)
    check_forward(case, None, torch.float32)
    check_dgrad(case, None, torch.float32)
    check_wgrad(case, None, torch.float32)


def taps_inside(height: int, width: int) -> Tensor:
    """How many of the nine taps of a 3×3 kernel lie inside the image."""
    ones = torch.ones(1, 1, height, width, device=DEVICE)
    return F.conv2d(ones, torch.ones(1, 1, 3, 3, device=DEVICE), padding=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [TILES, FLAT], ids=["taps", "flat"])
def test_what_is_padded_is_the_activation(config, dtype):
    """With x = 0 and a shift of 1 the activation is 1 inside and 0 outside; small whole numbers are exact in every dtype."""
    channels, height, width = 3, 4, 5
    zeros = torch.zeros(1, channels, height, width, dtype=dtype, device=DEVICE).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(channels, channels, 3, 3, dtype=dtype, device=DEVICE).contiguous(memory_format=torch.channels_last)
    one, inside = torch.ones(channels, device=DEVICE), taps_inside(height, width)
    y, _ = conv_forward(zeros, weight, stride=1, prologue=(one, one), statistics=False, config=config, backend="fused")
    assert torch.equal(y.float(), (channels * inside).expand(1, channels, -1, -1))
    k = torch.stack([one, one, one])
    dx, _ = conv_dgrad(zeros, weight, (height, width), stride=1, g_affine=(k, zeros), epilogue=None, config=config, backend="fused")
    assert torch.equal(dx.float(), (channels * inside).expand(1, channels, -1, -1))
    dw = conv_wgrad(zeros, zeros, 3, stride=1, prologue=(one, one), g_affine=(k, zeros), split=2, config=config, backend="fused")
    seen = torch.tensor([height - 1, height, height - 1], device=DEVICE)[:, None] * torch.tensor(
        [width - 1, width, width - 1], device=DEVICE
    )
    assert torch.equal(dw, (seen.float()).expand(channels, channels, 3, 3))


def test_statistics_do_not_cancel():
    case = draw(ConvShape(3, 3, 5, 7, 18, 1, 1), seed=4)
    # A channel that is 1 everywhere adds 1000 to every output.
    case.scale[0], case.shift[0], case.weight[:, 0] = 0, 1, 1000
    check_forward(case, TILES, torch.float32)


def test_the_same_bits_again_and_the_same_sum_however_it_is_cut():
    case = draw(ConvShape(3, 5, 7, 5, 18, 3, 1), seed=5).as_dtype(torch.float32)
    first, second = (forward(case, "fused", FLAT) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    first, second = (dgrad(case, "fused", FLAT) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    first, second = (wgrad(case, "fused", FLAT, split=2) for _ in range(2))
    assert torch.equal(first, second)
    # More parts than there are steps.
    check_wgrad(draw(case.shape, seed=5), FLAT, torch.float32, split=100)


def test_a_nan_is_not_hidden_by_the_relu():
    case = draw(ConvShape(1, 3, 3, 3, 4, 1, 1), seed=6).as_dtype(torch.float32)
    case.x[0, 1, 2, 2] = torch.nan
    y, _ = forward(case, "fused", TILES)
    assert y[0, :, 2, 2].isnan().all() and y.isnan().sum() == 4


# NumPy, with which kernels are interpreted, remarks on what is not finite.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("where", ["y_in", "scale"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_relu_passes_what_pytorch_s_passes(backend, where, value):
    """Where z is NaN its gradient goes through; ±∞ are as good as other numbers. A mask that is not finite arrives as such a scale."""
    case = draw(ConvShape(2, 3, 3, 5, 4, 3, 1), seed=7).as_dtype(torch.float32)
    if where == "y_in":
        case.x[1, 1, 2, 3] = value
    else:
        case.affine.scale[1] = value
    z = (case.x * column(case.affine.scale) + column(case.affine.shift)).requires_grad_()
    dx, _ = dgrad(case, backend, TILES, epilogue=None)
    (expected,) = torch.autograd.grad(z.relu(), z, dx)
    g_z, sums = dgrad(case, backend, TILES)
    assert torch.equal(g_z, expected)
    # Batch-norm's own passes decide alike.
    affine = passes.Affine(*(getattr(case.affine, name) for name in ("mean", "rstd", "scale", "shift")))
    _, _, gated = passes.backward_reduce(dx, case.x, affine, relu_from="recompute", write_gz=True, backend=backend)
    assert torch.equal(gated, g_z)
    if where == "y_in":
        assert sums.sum(0)[1].isfinite().tolist() == [True, False, True]
