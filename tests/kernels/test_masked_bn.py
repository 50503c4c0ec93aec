"""`masked_bn` against the formula written out, every gradient included."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from der_fast.kernels.masked_bn import masked_bn

EPS, MOMENTUM = 1e-5, 0.1
CHANNELS = (1, 3, 17, 64, 130)
SHAPES = ((3, 5, 7), (1, 7, 3))
MASKS = ("absent", "all", "none", "one", "random")
TAILS = ("plain", "relu", "residual", "residual+relu")
# In single precision our error may be twice that of plain eager PyTorch or, if that is more, four units in the last place of the
# sum of the magnitudes that are added up: what naive summation itself is off by. Gradients of γ, β and m are sums that cancel.
FLOOR = 4 * 2.0**-23


@dataclass
class Case:
    """The arguments of one call; `upstream` is the gradient that arrives at its result."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    mask: Tensor | None
    residual: Tensor | None
    upstream: Tensor
    relu: bool
    training: bool

    def leaves(self, dtype=torch.float64):
        """The differentiable inputs by name, as fresh leaves (keeping strides), and the running statistics."""
        named = {"x": self.x, "weight": self.weight, "bias": self.bias, "mask": self.mask, "residual": self.residual}
        fresh = {name: value.to(dtype).clone().requires_grad_() for name, value in named.items() if value is not None}
        return fresh, self.mean.to(dtype).clone(), self.var.to(dtype).clone()


def draw_mask(kind, channels, generator):
    if kind == "absent":
        return None
    mask = torch.rand(channels, generator=generator) if kind == "random" else torch.zeros(channels)
    if kind == "all":
        mask.fill_(1)
    if kind == "one":
        mask[channels // 2] = 1
    return mask


def draw(channels, shape=(3, 5, 7), mask="random", tail="residual+relu", training=True, channels_last=False, seed=0):
    generator = torch.Generator().manual_seed(seed * 1000 + channels)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def normal(*size):
        return torch.randn(*size, generator=generator)

    def image():
        return normal(shape[0], channels, *shape[1:]).contiguous(memory_format=layout)

    return Case(
        x=image() * 2 + 0.5 * normal(channels).reshape(1, -1, 1, 1),
        weight=normal(channels),
        bias=normal(channels),
        mean=normal(channels) * 0.3,
        var=torch.rand(channels, generator=generator) * 3 + 0.2,
        mask=draw_mask(mask, channels, generator),
        residual=image() if "residual" in tail else None,
        upstream=image(),
        relu="relu" in tail,
        training=training,
    )


def literal(inputs, mean, var, relu, training):
    """m ⊙ (γx̂ + β) + h, then ReLU, one operation after the other; also returns x̂ and the ReLU's input."""

    def per_channel(vector):
        return vector.reshape(1, -1, 1, 1)

    x = inputs["x"]
    if training:
        mean = x.mean((0, 2, 3))
        var = ((x - per_channel(mean)) ** 2).mean((0, 2, 3))
    x_hat = (x - per_channel(mean)) / torch.sqrt(per_channel(var) + EPS)
    z = per_channel(inputs["weight"]) * x_hat + per_channel(inputs["bias"])
    if "mask" in inputs:
        z = per_channel(inputs["mask"]) * z
    if "residual" in inputs:
        z = z + inputs["residual"]
    return (torch.where(z > 0, z, torch.zeros_like(z)) if relu else z), x_hat, z


def ours(inputs, mean, var, relu, training):
    out = masked_bn(
        inputs["x"],
        inputs["weight"],
        inputs["bias"],
        mean,
        var,
        mask=inputs.get("mask"),
        residual=inputs.get("residual"),
        relu=relu,
        training=training,
        momentum=MOMENTUM,
        eps=EPS,
    )
    return out, None, None


def eager(inputs, mean, var, relu, training):
    """What one would write without this operation."""
    out = F.batch_norm(inputs["x"], mean, var, inputs["weight"], inputs["bias"], training, MOMENTUM, EPS)
    if "mask" in inputs:
        out = out * inputs["mask"].reshape(1, -1, 1, 1)
    if "residual" in inputs:
        out = out + inputs["residual"]
    return (F.relu(out) if relu else out), None, None


def results(function, case, upstream=None, dtype=torch.float64):
    """Run forward and backward; return output and gradients by name."""
    inputs, mean, var = case.leaves(dtype)
    out = function(inputs, mean, var, case.relu, case.training)[0]
    gradients = torch.autograd.grad(out, list(inputs.values()), (case.upstream if upstream is None else upstream).to(dtype))
    return {"out": out.detach(), **dict(zip(inputs, gradients, strict=True))}


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_every_gradient_in_double_precision(channels, mask, tail, training):
    for shape in SHAPES:
        for channels_last in (False, True):
            case = draw(channels, shape, mask, tail, training, channels_last)
            found, expected = results(ours, case), results(literal, case)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


def magnitudes(case, upstream):
    """For the output and each gradient, the largest sum of absolute values that one of its entries adds up."""
    inputs, mean, var = case.leaves()
    with torch.no_grad():
        _, x_hat, z = literal(inputs, mean, var, case.relu, case.training)
        x_hat, g = x_hat.abs(), upstream.double().abs() * (z > 0 if case.relu else 1.0)
        mask, gamma, beta = (inputs[name].abs().reshape(1, -1, 1, 1) if name in inputs else 1.0 for name in ("mask", "weight", "bias"))
        spread = inputs["x"].var((0, 2, 3), correction=0) if case.training else var
        means = g.mean((0, 2, 3), keepdim=True) + x_hat * (g * x_hat).mean((0, 2, 3), keepdim=True)
        sizes = {
            "out": mask * (gamma * x_hat + beta) + (inputs["residual"].abs() if "residual" in inputs else 0),
            "x": mask * gamma / torch.sqrt(spread + EPS).reshape(1, -1, 1, 1) * (g + (means if case.training else 0)),
            "weight": (g * mask * x_hat).sum((0, 2, 3)),
            "bias": (g * mask).sum((0, 2, 3)),
            "mask": (g * (gamma * x_hat + beta)).sum((0, 2, 3)),
            "residual": g,
        }
    return {name: float(size.max()) for name, size in sizes.items()}


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("training", [True, False])
def test_single_precision_is_no_worse_than_eager(channels, tail, training):
    for mask in MASKS:
        for channels_last in (False, True):
            case = draw(channels, (4, 9, 7), mask, tail, training, channels_last, seed=1)
            inputs, mean, var = case.leaves()
            # Rounding may carry a value across the ReLU's corner, where gradients jump: none arrives there.
            corner = literal(inputs, mean, var, case.relu, training)[2].abs() < 1e-4
            upstream = torch.where(corner, torch.zeros_like(case.upstream), case.upstream)
            truth, size = results(literal, case, upstream), magnitudes(case, upstream)
            found, plain = (results(function, case, upstream, torch.float32) for function in (ours, eager))
            for name, exact in truth.items():
                error, allowed = ((result[name] - exact).abs().max() for result in (found, plain))
                assert found[name].dtype == torch.float32
                assert error <= max(2 * float(allowed), FLOOR * size[name]), (name, mask, channels_last)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tail", TAILS)
def test_gradients_are_the_two_reductions(tail, training):
    case = draw(17, (3, 5, 7), "random", tail, training)
    found = results(ours, case)
    inputs, mean, var = case.leaves()
    _, x_hat, z = literal(inputs, mean, var, case.relu, training)
    with torch.no_grad():
        g = case.upstream.double() * (z > 0 if case.relu else 1.0)
        first, second = g.sum((0, 2, 3)), (g * x_hat).sum((0, 2, 3))
        weight, bias, mask = inputs["weight"], inputs["bias"], inputs["mask"]
        torch.testing.assert_close(found["bias"], mask * first, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(found["weight"], mask * second, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(found["mask"], weight * second + bias * first, rtol=1e-11, atol=1e-12)
        if case.residual is not None:
            assert torch.equal(found["residual"], g)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_by_finite_differences(training):
    case = draw(3, (2, 3, 3), "random", "residual", training)
    inputs, mean, var = case.leaves()
    names = list(inputs)

    def function(*values):
        return ours(dict(zip(names, values, strict=True)), mean.clone(), var.clone(), False, training)[0]

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("momentum", [0.1, 0.25, 1.0])
def test_running_statistics_move_towards_mean_and_unbiased_variance(channels, shape, momentum):
    case = draw(channels, shape)
    inputs, mean, var = case.leaves()
    masked_bn(inputs["x"], inputs["weight"], inputs["bias"], mean, var, mask=inputs["mask"], training=True, momentum=momentum)
    values = inputs["x"].detach().transpose(0, 1).flatten(1)
    unbiased = ((values - values.mean(1, keepdim=True)) ** 2).sum(1) / (values.shape[1] - 1)
    torch.testing.assert_close(mean, (1 - momentum) * case.mean.double() + momentum * values.mean(1))
    torch.testing.assert_close(var, (1 - momentum) * case.var.double() + momentum * unbiased)


def test_evaluation_leaves_the_running_statistics_alone():
    case = draw(17, training=False)
    inputs, mean, var = case.leaves(torch.float32)
    ours(inputs, mean, var, case.relu, False)
    assert torch.equal(mean, case.mean) and torch.equal(var, case.var)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("learning", [True, False])
def test_inputs_stay_as_they_are(training, channels_last, learning):
    for tail in TAILS:
        case = draw(17, tail=tail, training=training, channels_last=channels_last)
        inputs, mean, var = case.leaves(torch.float32)
        before = {name: value.detach().clone() for name, value in inputs.items()}
        with torch.set_grad_enabled(learning):
            out = ours(inputs, mean, var, case.relu, training)[0]
        assert all(out.data_ptr() != value.data_ptr() for value in inputs.values())
        if learning:
            out.backward(case.upstream)
        for name, value in inputs.items():
            assert torch.equal(value.detach(), before[name]), name


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_result_has_the_layout_of_x(channels_last):
    case = draw(17, channels_last=channels_last)
    inputs, mean, var = case.leaves(torch.float32)
    assert ours(inputs, mean, var, True, True)[0].stride() == case.x.stride()


@pytest.mark.parametrize("training", [True, False])
def test_a_mask_of_ones_changes_no_bit(training):
    with_mask, without = draw(64, mask="all", training=training), draw(64, mask="absent", training=training)
    found, expected = (results(ours, case, dtype=torch.float32) for case in (with_mask, without))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tail", ["plain", "relu"])
def test_a_channel_with_mask_zero_is_exactly_zero(tail, training):
    case = draw(17, mask="one", tail=tail, training=training)
    case.bias.abs_()
    found = results(ours, case, dtype=torch.float32)
    others = [c for c in range(17) if c != 8]
    assert bool((found["out"][:, others] == 0).all()) and bool((found["out"][:, 8] != 0).any())
    for name in ("weight", "bias"):
        assert bool((found[name][others] == 0).all()) and bool(found[name][8] != 0)
    assert bool((found["x"][:, others] == 0).all())


@pytest.mark.parametrize("training", [True, False])
def test_no_channels_at_all(training):
    empty = torch.zeros(0)
    x = torch.zeros(2, 0, 5, 3, requires_grad=True)
    out = masked_bn(x, empty, empty, empty.clone(), empty.clone(), mask=empty, residual=x, relu=True, training=training)
    assert out.shape == (2, 0, 5, 3)
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tail", TAILS)
def test_bfloat16_activations_are_rounded_at_most_twice(tail, training):
    # As under autocast: activations in bfloat16, everything per channel in single precision.
    case = draw(17, (4, 9, 7), "random", tail, training)
    case.x = case.x.bfloat16()
    case.residual = None if case.residual is None else case.residual.bfloat16()
    inputs, mean, var = case.leaves(torch.float32)
    inputs = {name: value.bfloat16() if name in ("x", "residual") else value for name, value in inputs.items()}
    with torch.no_grad():
        out = ours(inputs, mean, var, case.relu, training)[0]
        exact_inputs, exact_mean, exact_var = case.leaves()
        exact = literal(exact_inputs, exact_mean, exact_var, case.relu, training)[0]
        before_adding = literal({**exact_inputs, "residual": torch.zeros_like(exact)}, exact_mean, exact_var, False, training)[0]
    assert out.dtype == torch.bfloat16
    assert bool(((out.double() - exact).abs() <= 2.0**-8 * (before_adding.abs() + exact.abs()) + 1e-5).all())
    assert mean.dtype == var.dtype == torch.float32


def test_large_offset_keeps_its_precision():
    # E[x²] − E[x]² would lose every digit here.
    generator = torch.Generator().manual_seed(3)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = (torch.randn(4, 17, 9, 7, generator=generator) + 1000).contiguous(memory_format=layout)
        ones, zeros = torch.ones(17), torch.zeros(17)
        out = masked_bn(x, ones, zeros, zeros.clone(), ones.clone(), training=True)
        exact = literal({"x": x.double(), "weight": ones.double(), "bias": zeros.double()}, None, None, False, True)[0]
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-3)
