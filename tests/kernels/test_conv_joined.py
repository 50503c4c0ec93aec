"""A dgrad that continues through the join before it: the reference against autograd, the fused kernel against float64."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from der_fast.kernels.affine import Affine
from der_fast.kernels.bits import pack_bits, unpack_bits
from der_fast.kernels.conv import ConvShape, ConvTiles, Join, conv_dgrad_joined

CONV = runpy.run_path(str(Path(__file__).with_name("test_conv.py")))
DEVICE, TILES, FLAT, column = (CONV[name] for name in ("DEVICE", "TILES", "FLAT", "column"))
poisoned = CONV["poisoned"]
# N, C, H, W, K, R, stride; what the ReLU passed is stored or recomputed; whether the join has a projection.
CASES = [
    (ConvShape(2, 3, 5, 7, 18, 3, 1), FLAT, False, False),
    (ConvShape(1, 17, 5, 3, 37, 3, 1), TILES, True, False),
    (ConvShape(3, 64, 3, 4, 3, 3, 1), TILES, True, True),
    (ConvShape(1, 130, 3, 2, 1, 3, 1), FLAT, True, True),
    (ConvShape(2, 1, 5, 4, 17, 3, 2), FLAT, True, True),
    (ConvShape(3, 17, 5, 5, 64, 3, 2), TILES, False, True),
    (ConvShape(2, 64, 4, 7, 5, 1, 1), TILES, True, False),
    (ConvShape(1, 130, 1, 1, 18, 3, 2), TILES, True, False),
]
EVERY = pytest.mark.parametrize(
    ("shape", "config", "stored", "projected"), CASES, ids=[f"{s.kernel}x{s.kernel}s{s.stride}-{s.channels}" for s, *_ in CASES]
)


def draw_join(case, stored: bool, projected: bool, seed: int = 50) -> tuple[Tensor, Join]:
    """The gradient that is added and a join, float64, of values that float16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)

    def image() -> Tensor:
        drawn = torch.randn(case.x.shape, generator=generator).half().to(DEVICE, torch.float64)
        return drawn.contiguous(memory_format=torch.channels_last)

    bits = pack_bits(torch.rand(case.shape.in_rows, case.shape.channels, generator=generator) < 0.6).to(DEVICE) if stored else None
    affine = Affine(**vars(case.affine))
    other = Affine(affine.mean + 0.25, affine.rstd * 2, affine.scale, affine.shift)
    return image(), Join(case.x, affine, bits, (image(), other) if projected else None)


def narrowed(join: Join, dtype: torch.dtype) -> Join:
    def of(pair: tuple[Tensor, Affine]) -> tuple[Tensor, Affine]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return pair[0].to(dtype), Affine(*(getattr(pair[1], name).to(wide) for name in ("mean", "rstd", "scale", "shift")))

    return Join(*of((join.y, join.affine)), join.bits, None if join.shortcut is None else of(join.shortcut))


def joined(case, added: Tensor, join: Join, backend: str = "reference", config: ConvTiles | None = None, **changes):
    size = (case.shape.height, case.shape.width)
    options = {"stride": case.shape.stride, "g_affine": (case.k, case.y), "config": config, "backend": backend} | changes
    return conv_dgrad_joined(case.g, case.weight, size, added=added, join=join, **options)


def check(case, config: ConvTiles | None, dtype: torch.dtype, stored: bool, projected: bool, **changes) -> None:
    added, join = draw_join(case, stored, projected)
    truth, _, _ = joined(case, added, join, **changes)
    magnitude = CONV["dgrad"](case.magnitudes(), epilogue=None, **changes)[0] + added.abs()
    narrow, rest = case.as_dtype(dtype), (added.to(dtype), narrowed(join, dtype))
    eager, _, _ = joined(narrow, *rest, **changes)
    ours, *partials = joined(narrow, *rest, "fused", config, **changes)
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
    CONV["assert_close"](ours, eager, truth, CONV["bound"](magnitude, dtype))
    assert (partials[1] is not None) == projected
    kept = ours.double()
    for sums, pair in zip(partials, [(join.y, join.affine), join.shortcut], strict=True):
        if sums is None:
            continue
        y, affine = pair
        normalised = (y - column(affine.mean)) * column(affine.rstd)
        scale = (kept.abs() * (normalised.abs() + column(affine.mean * affine.rstd).abs() + 1)).sum((0, 2, 3))
        for found, terms in zip(sums.double().sum(0), (kept, kept * normalised), strict=True):
            assert bool(((found - terms.sum((0, 2, 3))).abs() <= 8 * torch.finfo(torch.float32).eps * scale).all())


@EVERY
def test_reference_equals_autograd(shape, config, stored, projected):
    """x = ReLU(y·scale + shift + h) is read by the convolution and by something whose gradient is `added`."""
    case = CONV["draw"](shape).as_dtype(torch.float64)
    added, join = draw_join(case, stored, projected)
    scale, shift = join.affine.scale, join.affine.shift
    mean, rstd = join.affine.mean, join.affine.rstd
    z = (column(scale) * join.y + column(shift)).requires_grad_()
    if stored:
        # A shortcut that carries z to the side that the bits name.
        open_ = unpack_bits(join.bits, shape.channels).reshape(shape.batch, shape.height, shape.width, shape.channels).permute(0, 3, 1, 2)
        x = (z + torch.where(open_, 1 + z.detach().abs(), -1 - z.detach().abs())).relu()
    else:
        x = z.relu()
    y = F.conv2d(x, case.weight, stride=shape.stride, padding=shape.kernel // 2)
    upstream = column(case.k[0]) * case.g + column(case.k[1]) * case.y + column(case.k[2])
    (g_z,) = torch.autograd.grad([y, x], z, [upstream, added])
    found, sums, shortcut_sums = joined(case, added, join)
    exact = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(found, g_z, **exact)
    x_hat = (join.y - column(mean)) * column(rstd)
    torch.testing.assert_close(sums.sum(0), torch.stack([g_z.sum((0, 2, 3)), (g_z * x_hat).sum((0, 2, 3))]), **exact)
    assert (shortcut_sums is None) == (not projected)
    if projected:
        values, other = join.shortcut
        x_hat = (values - column(other.mean)) * column(other.rstd)
        torch.testing.assert_close(shortcut_sums.sum(0), torch.stack([g_z.sum((0, 2, 3)), (g_z * x_hat).sum((0, 2, 3))]), **exact)


@EVERY
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_fused(shape, config, stored, projected):
    check(CONV["draw"](shape), config, torch.float32, stored, projected)


@pytest.mark.parametrize("number", [1, 4])
def test_fused_in_half_precision(number):
    shape, config, stored, projected = CASES[number]
    check(CONV["draw"](shape, torch.float16), config, torch.float16, stored, projected)


def test_default_tiles_without_a_gradient_that_is_formed_on_load():
    check(CONV["draw"](ConvShape(2, 24, 3, 4, 40, 3, 1)), None, torch.float32, True, True, g_affine=None)


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_all_or_nothing_passes_and_a_nan_is_not_hidden(backend):
    case = CONV["draw"](ConvShape(1, 9, 3, 3, 4, 1, 1), seed=6)
    narrow = case.as_dtype(torch.float32)
    added, join = draw_join(case, True, False)
    rest = [added.float(), narrowed(join, torch.float32)]
    for bits in (torch.zeros_like(join.bits), pack_bits(torch.ones(9, 9, dtype=torch.bool)).to(DEVICE)):
        g_z, sums, _ = joined(narrow, rest[0], replace(rest[1], bits=bits), backend, TILES)
        assert bool((g_z != 0).all()) == bool(bits.any()) == bool((sums != 0).any())
    rest[0][0, 4, 1, 1] = torch.nan
    g_z, sums, _ = joined(narrow, rest[0], replace(rest[1], bits=bits), backend, TILES)
    assert g_z.isnan().sum() == 1 and bool(sums.sum((0, 1)).isnan()[4]) and sums.sum((0, 1)).isnan().sum() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"added": lambda a: a[:, :4]}, r"added must have shape \(2, 5, 4, 3\)"),
        ({"added": lambda a: a.half()}, "added must be torch.float32"),
        ({"join": lambda j: replace(j, y=j.y.contiguous())}, "join y must have channels-last strides"),
        ({"join": lambda j: replace(j, bits=j.bits[1:])}, r"join bits must have shape \(24, 1\)"),
        ({"join": lambda j: replace(j, bits=j.bits.int())}, "join bits must be torch.uint8"),
        ({"join": lambda j: replace(j, shortcut=(j.y, replace(j.affine, mean=j.affine.mean[1:])))}, r"join shortcut mean must have shape"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_what_does_not_fit_is_refused(changes, message, backend):
    case = CONV["draw"](ConvShape(2, 5, 4, 3, 3, 3, 1)).as_dtype(torch.float32)
    added, join = draw_join(CONV["draw"](case.shape), True, False)
    given = {"added": added.float(), "join": narrowed(join, torch.float32)}
    given |= {name: change(given[name]) for name, change in changes.items()}
    with pytest.raises(ValueError, match=message):
        joined(case, given["added"], given["join"], backend)


def test_boxed_tiles_are_refused():
    case = CONV["draw"](ConvShape(2, 5, 4, 3, 3, 3, 1)).as_dtype(torch.float32)
    added, join = draw_join(CONV["draw"](case.shape), True, False)
    with pytest.raises(ValueError, match="boxed tiles cannot continue through a join; take tiles with boxed=False"):
        joined(case, added.float(), narrowed(join, torch.float32), "fused", replace(TILES, boxed=True))
