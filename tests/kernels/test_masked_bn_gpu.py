"""`masked_bn` on a GPU: real sizes, tensors beyond 2³¹ elements, CUDA graphs, the same bits every time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from der_fast.kernels import masked_bn as passes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
LAST = torch.channels_last
SHAPES = ((128, 64, 32, 32), (128, 128, 16, 16), (128, 512, 4, 4), (32, 64, 112, 112), (129, 96, 9, 7), (64, 17, 32, 32))


def draw(shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype).contiguous(memory_format=LAST)


def column(vector):
    return vector.reshape(1, -1, 1, 1)


def step(inputs, running, upstream, tail, backend="fused"):
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items() if name != "residual" or "residual" in tail}
    x, weight, bias, mask, residual = (leaves.get(name) for name in ("x", "weight", "bias", "mask", "residual"))
    if backend == "eager":
        out = F.batch_norm(x, *running, weight, bias, True, 0.1, 1e-5) * column(mask).to(x.dtype)
        out = out if residual is None else out + residual
        out = out.relu() if "relu" in tail else out
    else:
        named = {"mask": mask, "residual": residual, "relu": "relu" in tail, "training": True, "backend": backend}
        out = passes.masked_bn(x, weight, bias, *running, **named)
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream)
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def draw_inputs(shape, dtype=torch.bfloat16):
    weight, bias, mask = torch.randn(3, shape[1], device="cuda", generator=torch.Generator("cuda").manual_seed(9)).unbind()
    mask = mask.sigmoid()
    mask[::5] = 0
    inputs = {"x": draw(shape, dtype), "weight": weight, "bias": bias, "mask": mask, "residual": draw(shape, dtype, 1)}
    return inputs, [torch.zeros_like(weight), torch.ones_like(weight)], draw(shape, dtype, 2)


@pytest.mark.parametrize("tail", ["relu", "residual+relu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_eager(shape, dtype, tail):
    inputs, running, upstream = draw_inputs(shape, dtype)
    exact_inputs = {name: value.double() for name, value in inputs.items()}
    x, var = exact_inputs["x"], exact_inputs["x"].var((0, 2, 3), correction=0)
    x_hat = (x - column(x.mean((0, 2, 3)))) * column(torch.rsqrt(var + 1e-5))
    z = column(exact_inputs["mask"]) * (column(exact_inputs["weight"]) * x_hat + column(exact_inputs["bias"]))
    z = z + exact_inputs["residual"] if "residual" in tail else z
    # Neither side of the ReLU's corner is wrong; gradients there would measure nothing.
    upstream = torch.where(z.abs() < 1e-4, 0, upstream).contiguous(memory_format=LAST)
    g = upstream.double() * (z > 0)
    first, second = g.sum((0, 2, 3)), (g * x_hat).sum((0, 2, 3))
    truth = {"out": z.relu(), "weight": exact_inputs["mask"] * second, "bias": exact_inputs["mask"] * first, "residual": g}
    truth["mask"] = exact_inputs["weight"] * second + exact_inputs["bias"] * first
    count = x.numel() // shape[1]
    scale = column(exact_inputs["mask"] * exact_inputs["weight"] * torch.rsqrt(var + 1e-5))
    truth["x"] = scale * (g - column(first) / count - x_hat * column(second) / count)
    found, plain = (step(inputs, [value.clone() for value in running], upstream, tail, backend) for backend in ("fused", "eager"))
    for name, value in found.items():
        error, eager = (float((result.double() - truth[name]).abs().max()) for result in (value, plain[name]))
        # One rounding of the largest value when storing, and naive summation's error of the sums.
        rounding = torch.finfo(dtype).eps / 2 if value.ndim == 4 else 0.0
        size = float((g.abs() * (1 + x_hat.abs())).sum((0, 2, 3)).max()) * 5 if value.ndim == 1 else float(z.abs().max()) * 4
        assert error <= max(2 * eager, rounding * float(truth[name].abs().max()) + 4 * 2.0**-23 * size), (name, error, eager)


def test_the_same_bits_twenty_times_with_poisoned_buffers():
    inputs, running, upstream = draw_inputs((128, 64, 32, 32))
    torch.use_deterministic_algorithms(True)
    try:
        first = step(inputs, [value.clone() for value in running], upstream, "residual+relu")
        for _ in range(20):
            again = step(inputs, [value.clone() for value in running], upstream, "residual+relu")
            assert all(torch.equal(again[name], value) and not bool(value.isnan().any()) for name, value in first.items())
    finally:
        torch.use_deterministic_algorithms(False)


def test_in_a_cuda_graph():
    inputs, running, upstream = draw_inputs((32, 64, 16, 16))
    moved = [value.clone() for value in running]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(inputs, moved, upstream, "residual+relu")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs, moved, upstream, "residual+relu")
    inputs["x"].copy_(draw((32, 64, 16, 16), seed=5))
    for value, before in zip(moved, running, strict=True):
        value.copy_(before)
    graph.replay()
    expected = step(inputs, running, upstream, "residual+relu")
    assert all(torch.equal(captured[name], value) for name, value in expected.items())
    assert all(torch.equal(value, after) for value, after in zip(moved, running, strict=True))


def test_more_than_two_to_the_31_elements():
    # 2³¹ + 2¹⁷ elements: the last rows lie beyond what 32 bits reach.
    shape = (16385, 64, 64, 32)
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free GPU memory")
    y = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=LAST).fill_(1)
    y[-1] = 3
    scale, shift = torch.full((2, 64), 2.0, device="cuda")
    affine, mean, _ = passes.finalize(passes.statistics(y, backend="fused"), scale, shift, None, 1e-5, backend="fused")
    torch.testing.assert_close(mean, torch.full_like(mean, 1 + 2 / 16385))
    out, bits = passes.apply(y, (scale, shift), relu=True, keep_bits=True, backend="fused")
    assert bool((out[-1] == 8).all()) and bool((out[:-1] == 4).all()) and bool((bits == 255).all())
    del out
    y_last = y[-1].clone()
    sums, _, g_z = passes.backward_reduce(y, y, affine, relu_from=bits, write_gz=True, backend="fused")
    assert torch.equal(g_z[-1], y_last) and bool((g_z[:-1] == 1).all())
    torch.testing.assert_close(sums.double().sum(0)[0], torch.full((64,), 2048 * (16384 + 3.0), device="cuda", dtype=torch.float64))
    k = torch.tensor([1.0, 2.0, 4.0], device="cuda").reshape(3, 1).expand(3, 64).contiguous()
    dy = passes.backward_apply(g_z, y, k, relu_from="none", affine=affine, backend="fused")
    assert bool((dy[-1] == 13).all()) and bool((dy[:-1] == 7).all())


def test_tensors_that_are_not_aligned():
    whole = draw((9, 17, 5, 7))
    y = whole[1:]
    assert y.data_ptr() % 16 != 0 and y.is_contiguous(memory_format=LAST)
    scale, shift = torch.randn(2, 17, device="cuda").unbind()
    found, expected = (
        passes.apply(y, (scale, shift), relu=True, keep_bits=True, backend=backend)[0].double() for backend in ("fused", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=2.0**-7, atol=1e-6)
