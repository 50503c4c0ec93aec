"""Each pass of `masked_bn`, both backends, against formulas in double precision; whatever torch.empty returns holds NaN before."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from der_fast.kernels import masked_bn as passes
from der_fast.kernels import triton_runtime
from der_fast.kernels.masked_bn.launch import Launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
ULP = 2.0**-23
# Rounding to nearest is off by this much of a value; the interpreter cuts off when it stores bfloat16, which is twice that.
ROUNDING = {torch.float32: ULP, torch.float16: 2.0**-11, torch.bfloat16: 2.0 ** (-7 if triton_runtime.interpreting() else -8)}
SHAPES = ((2, 1, 8, 8), (4, 3, 8, 8), (1, 17, 7, 3), (2, 64, 5, 7), (2, 24, 4, 4), (1, 130, 3, 5))
# (backend, launch, shape, dtype); without a launch the heuristics choose, which for these sizes means one tile per program.
PLAIN = [(backend, None, shape, torch.float32) for backend in ("reference", "fused") for shape in SHAPES]
PLAIN += [(backend, None, (1, 17, 7, 3), dtype) for backend in ("reference", "fused") for dtype in (torch.bfloat16, torch.float16)]
# Several tiles per program, the last of them empty or not full.
LAUNCHES = (Launch(16, 64, 3), Launch(32, 128, 2))
CUT = [("fused", launch, shape, torch.float32) for launch in LAUNCHES for shape in ((6, 3, 16, 16), (1, 17, 7, 9), (2, 64, 5, 7))]
WAYS = pytest.mark.parametrize(("backend", "launch"), [("reference", None), ("fused", None), *(("fused", launch) for launch in LAUNCHES)])


def each(modes, thorough):
    """Every mode with one shape and every dtype, the thorough ones with every shape and cut in other ways too."""
    plan = [(mode, *case) for mode in modes for case in PLAIN if case[2] == (1, 17, 7, 3)]
    plan += [(mode, *case) for mode in thorough for case in PLAIN + CUT if case[2] != (1, 17, 7, 3)]
    return pytest.mark.parametrize(("mode", "backend", "launch", "shape", "dtype"), plan)


@pytest.fixture(autouse=True)
def poisoned():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and bool(torch.empty(9, device=DEVICE).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape, dtype=torch.float32, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def rows(y):
    return y.double().permute(0, 2, 3, 1).flatten(0, 2)


def draw_affine(channels, seed=0):
    mean, scale, shift = draw(3, channels, seed=seed).unbind()
    return passes.Affine(mean, 0.5 + draw(channels, seed=seed + 50).abs(), scale, shift)


def assert_close(found, exact, allowed):
    excess = ((found.double() - exact).abs() - allowed).max()
    assert bool(excess <= 0), f"the error exceeds what is allowed by {excess}"


@pytest.mark.parametrize(("backend", "launch", "shape", "dtype"), PLAIN + CUT)
def test_statistics(backend, launch, shape, dtype):
    y = draw(*shape, dtype=dtype) * 2 + 3
    partials = passes.statistics(y, launch=launch, backend=backend)
    counts, means, squares = partials.double().unbind(1)
    values = rows(y)
    assert partials.dtype == torch.float32 and bool((counts.sum(0) == len(values)).all())
    centre = (counts * means).sum(0) / len(values)
    assert_close(centre, values.mean(0), 4 * ULP * values.abs().mean(0))
    total = (squares + counts * (means - centre) ** 2).sum(0)
    assert_close(total, ((values - values.mean(0)) ** 2).sum(0), 16 * ULP * total)


@WAYS
def test_a_large_mean_costs_no_digits(backend, launch):
    y = (draw(4, 17, 7, 9) + 1e4).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(17, device=DEVICE), torch.zeros(17, device=DEVICE)
    affine, mean, var = passes.finalize(passes.statistics(y, launch=launch, backend=backend), weight, bias, None, EPS, backend=backend)
    values = rows(y)
    # A mean near 1e4 is stored with an error of up to 2⁻¹¹, partial means too: that moves the variance by 2·2⁻¹¹·Σ n·|mean_p − mean|/M at
    # most, and the sum is no more than σ. E[x²] − E[x]² would be off by 1e8·2⁻²³ ≈ 12.
    assert_close(mean, values.mean(0), 2.0**-10)
    assert_close(var, values.var(0), 2.0**-10 * values.std(0))
    biased = values.var(0, correction=0) + EPS
    assert_close(affine.rstd, biased.rsqrt(), 2.0**-10 / biased)


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize(("parts", "channels"), [(1, 1), (2, 17), (200, 9)])
@pytest.mark.parametrize("masked", [True, False])
def test_finalize(backend, parts, channels, masked):
    generator = torch.Generator().manual_seed(parts)
    counts = torch.randint(1, 40, (parts,), generator=generator)
    samples = [torch.randn(int(count), channels, generator=generator).double() * 2 + 5 for count in counts]
    partials = torch.stack([torch.stack([torch.full_like(s[0], len(s)), s.mean(0), ((s - s.mean(0)) ** 2).sum(0)]) for s in samples])
    # A tile of nothing but padding: its count is 0 and the rest may be anything.
    nothing = torch.full((1, 3, channels), math.nan)
    nothing[:, 0] = 0
    partials = torch.cat([nothing, partials.float(), nothing]).to(DEVICE)
    weight, bias = draw(channels, seed=1), draw(channels, seed=2)
    mask = draw(channels, seed=3).sigmoid() if masked else None
    if mask is not None:
        mask[0] = 0
    affine, mean, var = passes.finalize(partials, weight, bias, mask, EPS, backend=backend)
    every = torch.cat(samples).to(DEVICE)
    m = 1.0 if mask is None else mask.double()
    rstd = (every.var(0, correction=0) + EPS).rsqrt()
    assert_close(mean, every.mean(0), 8 * ULP * 5)
    assert_close(affine.mean, every.mean(0), 8 * ULP * 5)
    assert_close(var, every.var(0), 16 * ULP * every.var(0))
    assert_close(affine.rstd, rstd, 16 * ULP * rstd)
    assert_close(affine.scale, m * weight.double() * rstd, 16 * ULP * (weight.abs() * rstd))
    assert_close(affine.shift, m * (bias - weight * every.mean(0) * rstd), 16 * ULP * (bias.abs() + 7 * weight.abs() * rstd))


def unpack(bits, channels):
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), axis=1, bitorder="little")).to(DEVICE)[:, :channels].bool()


@each(
    ("plain", "relu", "relu+bits", "residual", "residual+relu+bits", "shortcut+relu+bits", "shortcut+bits"), ("plain", "shortcut+relu+bits")
)
def test_apply(mode, backend, launch, shape, dtype):
    y, h = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    vectors = draw(4, shape[1], seed=2)
    residual = h if "residual" in mode or "shortcut" in mode else None
    shortcut = (vectors[2], vectors[3]) if "shortcut" in mode else None
    relu, keep = "relu" in mode, "bits" in mode
    out, bits = passes.apply(
        y, (vectors[0], vectors[1]), residual=residual, residual_affine=shortcut, relu=relu, keep_bits=keep, launch=launch, backend=backend
    )
    scale, shift, scale_h, shift_h = vectors.double()
    product, constant = (rows(h) * (scale_h if shortcut else 1), shift_h if shortcut else 0) if residual is not None else (0 * rows(h), 0)
    z = rows(y) * scale + shift + product + constant
    size = (rows(y) * scale).abs() + shift.abs() + product.abs() + shift_h.abs()
    exact = z.relu() if relu else z
    assert out.dtype == dtype and out.shape == y.shape and out.is_contiguous(memory_format=torch.channels_last)
    assert_close(rows(out), exact, ROUNDING[dtype] * exact.abs() + 4 * ULP * size + (2.0**-24 if dtype == torch.float16 else 0))
    assert (bits is None) == (not keep)
    if keep:
        assert bits.shape == (len(z), -(-shape[1] // 8)) and bits.dtype == torch.uint8
        clear = z.abs() > 4 * ULP * size
        assert torch.equal(unpack(bits, shape[1])[clear], z[clear] > 0) and bool(clear.float().mean() > 0.9)
        unused = unpack(bits, bits.shape[1] * 8)[:, shape[1] :]
        assert not bool(unused.any())


def gate(mode, y, affine, seed):
    """A way of saying what the ReLU passed, and the (M, C) booleans it stands for."""
    count = y.numel() // y.shape[1]
    if mode == "bits":
        passed = draw(count, y.shape[1], seed=seed) > 0
        packed = np.packbits(passed.cpu().numpy(), axis=1, bitorder="little")
        return torch.from_numpy(packed).to(DEVICE), passed
    if mode == "recompute":
        return mode, rows(y) * affine.scale + affine.shift > 0
    return mode, torch.ones(count, y.shape[1], dtype=torch.bool, device=DEVICE)


def gradient(y, affine):
    """A gradient that is 0 where rounding could carry y·scale + shift across the ReLU's corner."""
    clear = (y * affine.scale.reshape(1, -1, 1, 1) + affine.shift.reshape(1, -1, 1, 1)).abs() > 1e-4
    return (draw(*y.shape, dtype=y.dtype, seed=7) * clear).contiguous(memory_format=torch.channels_last)


@each(("none", "recompute", "bits", "bits+shortcut"), ("recompute", "bits+shortcut"))
def test_backward_reduce(mode, backend, launch, shape, dtype):
    y, affine = draw(*shape, dtype=dtype), draw_affine(shape[1])
    g = gradient(y.float(), affine).to(dtype)
    relu_from, passed = gate(mode.split("+")[0], y, affine, 9)
    shortcut = (draw(*shape, dtype=dtype, seed=4), draw_affine(shape[1], 5)) if "shortcut" in mode else None
    write = mode != "none"
    partials, others, g_z = passes.backward_reduce(
        g, y, affine, relu_from=relu_from, shortcut=shortcut, write_gz=write, launch=launch, backend=backend
    )
    exact = rows(g) * passed
    assert (g_z is not None) == write and (others is not None) == (shortcut is not None)
    if write:
        assert g_z.dtype == dtype and g_z.is_contiguous(memory_format=torch.channels_last) and torch.equal(rows(g_z), exact)
    for sums, values, norm in ((partials, y, affine), *(() if shortcut is None else ((others, *shortcut),))):
        x_hat = (rows(values) - norm.mean) * norm.rstd
        assert sums.dtype == torch.float32 and sums.shape[1:] == (2, shape[1])
        assert_close(sums.double().sum(0)[0], exact.sum(0), 4 * ULP * exact.abs().sum(0))
        size = (exact.abs() * (rows(values).abs() + norm.mean.abs()) * norm.rstd).sum(0)
        assert_close(sums.double().sum(0)[1], (exact * x_hat).sum(0), 4 * ULP * size)


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize(("parts", "channels"), [(1, 1), (3, 17), (200, 9)])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("count", [105, math.inf])
def test_backward_coefficients(backend, parts, channels, masked, count):
    partials = draw(parts, 2, channels)
    affine, weight, bias = draw_affine(channels), draw(channels, seed=1), draw(channels, seed=2)
    mask = draw(channels, seed=3).sigmoid() if masked else None
    if mask is not None:
        mask[0] = 0
        affine.scale[0] = affine.shift[0] = 0
    k, d_weight, d_bias, d_mask = passes.backward_coefficients(partials, count, affine, weight, bias, mask, backend=backend)
    first, second = partials.double().sum(0)
    most1, most2 = partials.double().abs().sum(0)
    m = 1.0 if mask is None else mask.double()
    mean, rstd, scale = (v.double() for v in (affine.mean, affine.rstd, affine.scale))
    assert torch.equal(k[0], affine.scale)
    assert_close(k[1], -scale * rstd * second / count, 8 * ULP * scale.abs() * rstd * most2 / count)
    constant = scale * (rstd * mean * second - first) / count
    assert_close(k[2], constant, 8 * ULP * scale.abs() * (rstd * mean.abs() * most2 + most1) / count)
    assert_close(d_weight, m * second, 8 * ULP * most2)
    assert_close(d_bias, m * first, 8 * ULP * most1)
    assert (d_mask is None) == (not masked)
    if mask is not None:
        assert_close(d_mask, weight.double() * second + bias.double() * first, 8 * ULP * (weight.abs() * most2 + bias.abs() * most1))
        assert bool((k[:, 0] == 0).all()) and d_weight[0] == 0 and d_bias[0] == 0 and d_mask[0] != 0


@each(("none", "recompute", "bits"), ("recompute", "bits"))
def test_backward_apply(mode, backend, launch, shape, dtype):
    y, affine, k = draw(*shape, dtype=dtype), draw_affine(shape[1]), draw(3, shape[1], seed=3)
    g = gradient(y.float(), affine).to(dtype)
    relu_from, passed = gate(mode, y, affine, 9)
    dy = passes.backward_apply(g, y, k, relu_from=relu_from, affine=affine, launch=launch, backend=backend)
    terms = (k[0].double() * rows(g) * passed, k[1] * rows(y), k[2].double().expand(len(passed), -1))
    exact, size = sum(terms), sum(term.abs() for term in terms)
    assert dy.dtype == dtype and dy.shape == y.shape and dy.is_contiguous(memory_format=torch.channels_last)
    assert_close(rows(dy), exact, ROUNDING[dtype] * exact.abs() + 4 * ULP * size + (2.0**-24 if dtype == torch.float16 else 0))


@WAYS
def test_nan_is_never_hidden(backend, launch):
    y = draw(2, 17, 4, 4)
    y[1, 5, 2, 3] = math.nan
    mean = passes.finalize(passes.statistics(y, launch=launch, backend=backend), *draw(2, 17), None, EPS, backend=backend)[1]
    assert torch.equal(mean.isnan(), torch.arange(17, device=DEVICE) == 5)
    vectors = draw(2, 17, seed=1)
    out, bits = passes.apply(y, (vectors[0], vectors[1]), relu=True, keep_bits=True, launch=launch, backend=backend)
    assert torch.equal(out.isnan(), y.isnan())
    assert bool(unpack(bits, 17)[rows(y).isnan()].all())
    affine = passes.Affine(vectors[0], vectors[0], vectors[0], vectors[1])
    sums, _, _ = passes.backward_reduce(draw(2, 17, 4, 4), y, affine, relu_from="recompute", launch=launch, backend=backend)
    assert torch.equal(sums.sum(0)[1].isnan(), torch.arange(17, device=DEVICE) == 5)


def test_the_same_bits_at_every_call():
    y, g, h = (draw(2, 24, 4, 8, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    weight, bias = draw(2, 24)

    def run():
        partials = passes.statistics(y, launch=Launch(16, 64, 2), backend="fused")
        affine, mean, var = passes.finalize(partials, weight, bias, None, EPS, backend="fused")
        out, bits = passes.apply(y, (affine.scale, affine.shift), residual=h, relu=True, keep_bits=True, backend="fused")
        sums, _, g_z = passes.backward_reduce(g, y, affine, relu_from=bits, write_gz=True, backend="fused")
        k, d_weight, d_bias, _ = passes.backward_coefficients(sums, 64, affine, weight, bias, None, backend="fused")
        dy = passes.backward_apply(g_z, y, k, relu_from="none", affine=affine, backend="fused")
        return mean, var, out, bits, g_z, d_weight, d_bias, dy

    first = run()
    for result, again in zip(first, run(), strict=True):
        assert torch.equal(result, again) and not bool(result.isnan().any())
