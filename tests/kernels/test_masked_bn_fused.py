"""`masked_bn` on backend 'fused': forward and every gradient against the formula in double precision, and how it is called."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from der_fast.errors import BackendError
from der_fast.kernels import triton_runtime
from der_fast.kernels.masked_bn import masked_bn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS, MOMENTUM = 1e-5, 0.25
# In single precision: what naive summation of the same magnitudes is off by. Gradients of γ, β and m are sums that cancel.
FLOOR = 4 * 2.0**-23
# Rounding to nearest when storing; the interpreter cuts off when it stores bfloat16, which is twice that.
ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0 ** (-7 if triton_runtime.interpreting() else -8)}
TAILS = ("plain", "relu", "residual", "residual+relu")
ODD = (1, 17, 7, 3)

CASES = [(ODD, torch.float32, "random", tail, training) for tail in TAILS for training in (True, False)]
CASES += [(ODD, torch.float32, mask, "residual+relu", True) for mask in ("absent", "all", "none", "one")]
CASES += [(shape, torch.float32, "random", "residual+relu", True) for shape in ((3, 1, 5, 7), (2, 3, 8, 8), (2, 64, 3, 5), (1, 130, 3, 3))]
CASES += [
    (ODD, dtype, "random", tail, training)
    for dtype in (torch.bfloat16, torch.float16)
    for tail in ("relu", "residual+relu")
    for training in (True, False)
]


@pytest.fixture(autouse=True)
def poisoned():
    torch.use_deterministic_algorithms(True)
    assert bool(torch.empty(9, device=DEVICE).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


def draw_mask(kind, channels, generator):
    if kind == "absent":
        return None
    mask = torch.rand(channels, generator=generator) if kind == "random" else torch.zeros(channels)
    if kind == "random" and channels > 1:
        mask[1] = 0
    if kind == "all":
        mask.fill_(1)
    if kind == "one":
        mask[channels // 2] = 1
    return mask


def draw(shape, dtype=torch.float32, mask="random", tail="residual+relu", seed=0):
    """The differentiable inputs by name, the running statistics and the gradient that arrives."""
    generator = torch.Generator().manual_seed(seed * 1000 + shape[1])

    def image():
        values = torch.randn(shape, generator=generator).to(dtype)
        return values.to(DEVICE).contiguous(memory_format=torch.channels_last)

    def vector():
        return torch.randn(shape[1], generator=generator).to(DEVICE)

    chosen = draw_mask(mask, shape[1], generator)
    inputs = {"x": image(), "weight": vector(), "bias": vector(), "mask": None if chosen is None else chosen.to(DEVICE)}
    inputs["residual"] = image() if "residual" in tail else None
    return {name: value for name, value in inputs.items() if value is not None}, (vector() * 0.3, vector().abs() + 0.2), image()


def column(vector):
    return vector.reshape(1, -1, 1, 1)


def literal(inputs, running, relu, training):
    """m ⊙ (γx̂ + β) + h, then ReLU, one operation after the other; also returns x̂ and the ReLU's input."""
    x = inputs["x"]
    mean, var = (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)) if training else running
    x_hat = (x - column(mean)) / torch.sqrt(column(var) + EPS)
    z = column(inputs["weight"]) * x_hat + column(inputs["bias"])
    if "mask" in inputs:
        z = column(inputs["mask"]) * z
    if "residual" in inputs:
        z = z + inputs["residual"]
    return (torch.where(z > 0, z, 0) if relu else z), x_hat, z


def eager(inputs, running, relu, training):
    out = F.batch_norm(inputs["x"], *running, inputs["weight"], inputs["bias"], training, MOMENTUM, EPS)
    if "mask" in inputs:
        out = out * column(inputs["mask"].to(out.dtype))
    if "residual" in inputs:
        out = out + inputs["residual"]
    return (F.relu(out),) if relu else (out,)


def fused(inputs, running, relu, training):
    return (
        masked_bn(
            *(inputs["x"], inputs["weight"], inputs["bias"], *running),
            mask=inputs.get("mask"),
            residual=inputs.get("residual"),
            relu=relu,
            training=training,
            momentum=MOMENTUM,
            eps=EPS,
            backend="fused",
        ),
    )


def results(function, inputs, running, upstream, relu, training, double=False):
    """Run forward and backward; return output, gradients and running statistics by name."""
    leaves = {name: (value.double() if double else value).clone().requires_grad_() for name, value in inputs.items()}
    moved = [(value.double() if double else value).clone() for value in running]
    out = function(leaves, moved, relu, training)[0]
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream.double() if double else upstream)
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}, moved


def magnitudes(inputs, running, upstream, relu, training):
    """For the output and each gradient, the largest sum of absolute values that one of its entries adds up."""
    exact = {name: value.double() for name, value in inputs.items()}
    _, x_hat, z = literal(exact, [value.double() for value in running], relu, training)
    x_hat, g = x_hat.abs(), upstream.double().abs() * (z > 0 if relu else 1.0)
    mask, gamma, beta = (column(exact[name].abs()) if name in exact else 1.0 for name in ("mask", "weight", "bias"))
    spread = exact["x"].var((0, 2, 3), correction=0) if training else running[1].double()
    means = g.mean((0, 2, 3), keepdim=True) + x_hat * (g * x_hat).mean((0, 2, 3), keepdim=True)
    centre = exact["x"].mean((0, 2, 3)) if training else running[0].double()
    rstd = column(torch.rsqrt(spread + EPS))
    # One scale and one shift: x·scale and μ·scale are rounded apart.
    shifted = gamma * rstd * (exact["x"].abs() + column(centre.abs()))
    sizes = {
        "out": mask * (shifted + beta) + (exact["residual"].abs() if "residual" in exact else 0),
        "x": mask * gamma * rstd * (g + (means * (1 + rstd * column(centre.abs())) if training else 0)),
        "weight": (g * mask * (x_hat + rstd * column(centre.abs()))).sum((0, 2, 3)),
        "bias": (g * mask).sum((0, 2, 3)),
        "mask": (g * (shifted + beta)).sum((0, 2, 3)),
        "residual": g * 0,
    }
    return {name: float(size.max()) for name, size in sizes.items()}


@pytest.mark.parametrize(("shape", "dtype", "mask", "tail", "training"), CASES)
def test_forward_and_every_gradient(shape, dtype, mask, tail, training):
    inputs, running, upstream = draw(shape, dtype, mask, tail)
    relu = "relu" in tail
    # Rounding may carry a value across the ReLU's corner, where gradients jump: none arrives there.
    corner = (
        literal({name: value.double() for name, value in inputs.items()}, [v.double() for v in running], relu, training)[2].abs() < 1e-4
    )
    upstream = torch.where(corner, 0, upstream)
    truth, _ = results(literal, inputs, running, upstream, relu, training, double=True)
    (found, moved), (plain, _) = (results(function, inputs, running, upstream, relu, training) for function in (fused, eager))
    size = magnitudes(inputs, running, upstream, relu, training)
    assert found.keys() == truth.keys()
    for name, exact in truth.items():
        error = (found[name].double() - exact).abs()
        allowed = max(2 * float((plain[name].double() - exact).abs().max()), FLOOR * size[name])
        stored = ROUNDING[found[name].dtype] * exact.abs() if found[name].ndim == 4 and name != "residual" else 0
        assert found[name].dtype == (dtype if found[name].ndim == 4 else torch.float32)
        assert bool((error <= allowed + stored).all()), (name, float(error.max()), allowed)
    if not training:
        assert all(torch.equal(value, before) for value, before in zip(moved, running, strict=True))
        return
    values = inputs["x"].double()
    for value, before, batch in zip(moved, running, (values.mean((0, 2, 3)), values.var((0, 2, 3))), strict=True):
        torch.testing.assert_close(value.double(), (1 - MOMENTUM) * before.double() + MOMENTUM * batch, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_double_precision(training):
    inputs, running, upstream = draw(ODD, torch.float64)
    inputs = {name: value.double() for name, value in inputs.items()}
    running = [value.double() for value in running]
    truth, found = (results(function, inputs, running, upstream, True, training, double=True)[0] for function in (literal, fused))
    for name, exact in truth.items():
        # ε and 1/M arrive in a kernel in single precision.
        torch.testing.assert_close(found[name], exact, rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_half_precision_parameters_gradients_keep_single_precision():
    # Sums over bfloat16 activations are not rounded to bfloat16 on the way: eager's mask gradient is.
    inputs, running, upstream = draw((2, 3, 8, 8), torch.bfloat16, tail="plain")
    truth, _ = results(literal, inputs, running, upstream, False, True, double=True)
    found, _ = results(fused, inputs, running, upstream, False, True)
    size = magnitudes(inputs, running, upstream, False, True)
    for name in ("weight", "bias", "mask"):
        assert float((found[name].double() - truth[name]).abs().max()) <= FLOOR * size[name], name


@pytest.mark.parametrize("training", [True, False])
def test_a_channel_with_mask_zero(training):
    inputs, running, upstream = draw(ODD, mask="none", tail="relu")
    inputs["bias"] = inputs["bias"].abs() + 1
    found, _ = results(fused, inputs, running, upstream, True, training)
    for name in ("out", "x", "weight", "bias"):
        assert bool((found[name] == 0).all()), name
    # z = 0 is the ReLU's corner, and its gradient there is 0. Without the ReLU the mask can grow again.
    assert bool((found["mask"] == 0).all())
    assert bool((results(fused, inputs, running, upstream, False, training)[0]["mask"] != 0).all())


# NumPy, with which kernels are interpreted, remarks on ∞ − ∞.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("relu", [True, False])
def test_a_mask_that_is_not_finite_shows_in_its_channel_alone(value, relu):
    inputs, running, _ = draw(ODD, tail="plain")
    inputs["mask"][4] = value
    for training in (True, False):
        out = fused(inputs, [v.clone() for v in running], relu, training)[0]
        finite = out.isfinite().all(3).all(2).all(0)
        assert torch.equal(finite, torch.arange(17, device=DEVICE) != 4)


def test_other_layouts_are_copied():
    inputs, running, upstream = draw((2, 17, 3, 5))
    expected = results(fused, inputs, running, upstream, True, True)[0]
    for name in ("x", "residual"):
        inputs[name] = inputs[name].contiguous()
    found = results(fused, inputs, running, upstream.contiguous(), True, True)[0]
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert found["out"].is_contiguous(memory_format=torch.channels_last)
    ones = results(fused, inputs, running, torch.ones_like(upstream), True, True)[0]
    spread = results(fused, inputs, running, torch.ones((), device=DEVICE).expand(upstream.shape), True, True)[0]
    assert all(torch.equal(ones[name], value) for name, value in spread.items())


@pytest.mark.parametrize("wanted", ["x", "weight", "mask", "residual"])
def test_only_what_is_asked_for_is_differentiated(wanted):
    inputs, running, upstream = draw(ODD)
    expected = results(fused, inputs, running, upstream, True, True)[0][wanted]
    inputs[wanted].requires_grad_()
    out = fused(inputs, running, True, True)[0]
    out.backward(upstream)
    assert torch.equal(inputs[wanted].grad, expected)
    assert all(value.grad is None for name, value in inputs.items() if name != wanted)


@pytest.mark.parametrize(("tail", "bits"), [("relu", 0), ("residual", 0), ("residual+relu", 1)])
def test_one_activation_is_saved_and_a_bit_per_element_at_joins(tail, bits):
    inputs, running, _ = draw((2, 17, 3, 5), tail=tail)
    inputs["x"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        fused(inputs, running, "relu" in tail, True)
    large = [tensor for tensor in saved if tensor.numel() > 17]
    assert sorted((tuple(t.shape), t.dtype) for t in large)[-1] == ((30, 3), torch.uint8) if bits else len(large) == 1
    assert len(large) == 1 + bits and any(t.data_ptr() == inputs["x"].data_ptr() for t in large)


def test_inputs_stay_as_they_are_and_gradients_of_gradients_are_refused():
    inputs, running, upstream = draw(ODD)
    before = {name: value.clone() for name, value in inputs.items()}
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    out = fused(leaves, running, True, True)[0]
    (gradient,) = torch.autograd.grad(out, [leaves["x"]], upstream.requires_grad_(), create_graph=True)
    assert all(torch.equal(value.detach(), before[name]) for name, value in inputs.items())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Layer(torch.nn.Module):
    """A convolution with its masked batch-norm, added to itself."""

    def __init__(self):
        super().__init__()
        inputs, (mean, var), _ = draw((2, 17, 4, 4))
        self.convolution = torch.nn.Conv2d(3, 17, 3)
        self.weight, self.bias = (torch.nn.Parameter(inputs[name]) for name in ("weight", "bias"))
        self.register_buffer("mean", mean)
        self.register_buffer("var", var)

    def forward(self, image):
        x = self.convolution(image)
        names = {"residual": x, "relu": True, "training": self.training, "backend": "fused"}
        return masked_bn(x, self.weight, self.bias, self.mean, self.var, **names)


def test_torch_export_in_evaluation_mode():
    torch.manual_seed(0)
    layer, images = Layer().to(DEVICE).eval(), torch.randn(2, 3, 6, 6, device=DEVICE)
    more = torch.randn(5, 3, 6, 6, device=DEVICE)
    with torch.no_grad():
        program = torch.export.export(layer, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
        assert "masked_bn_apply" in program.graph_module.code
        torch.testing.assert_close(program.module()(more), layer(more))
    with pytest.raises(BackendError, match="evaluation mode without gradients only"):
        torch.export.export(layer.train(), (images,))


def test_torch_compile():
    torch.manual_seed(0)
    layer, images = Layer().to(DEVICE), torch.randn(2, 3, 6, 6, device=DEVICE)
    compiled = torch.compile(layer, backend="eager")
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    found = []
    for function in (layer, compiled):
        layer.load_state_dict(state)
        out = function(images)
        found.append((out.detach(), layer.mean.clone(), *torch.autograd.grad(out.square().sum(), list(layer.parameters()))))
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(images), layer(images))
