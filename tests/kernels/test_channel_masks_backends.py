"""`masks_and_sparsity` on every backend against the reference in double precision."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest
import torch

from der_fast import native
from der_fast.errors import BackendError
from der_fast.kernels import triton_runtime
from der_fast.kernels.channel_masks import ConvolutionGroups, MaskStructure, channel_masks, masks_and_sparsity, sparsity_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float64]
SNAP = 2.0**-24
# Of a mask in single precision, whose largest value is one.
FLOOR = 2.0**-22

STRUCTURES = {
    "one channel": ([1], [ConvolutionGroups((), (0,), 3, 9)]),
    "odd": (
        [2, 3, 1, 17],
        [
            ConvolutionGroups((), (0,), 3, 9),
            ConvolutionGroups((0,), (1,), 0, 9),
            ConvolutionGroups((0, 1), (2,), 0, 1),
            ConvolutionGroups((2,), (0, 3), 0, 9),
            ConvolutionGroups((3,), (1,), 0, 25),
            ConvolutionGroups((3,), (3,), 0, 1),
        ],
    ),
    # Rows of 128: below, at and above one, and several; a group that nothing uses, and one without channels.
    "rows": (
        [64, 128, 130, 513, 5, 0],
        [ConvolutionGroups((), (0,), 3, 49), *(ConvolutionGroups((g,), (h,), 0, 9) for g in range(4) for h in (0, 1, 2, 3, 5))],
    ),
    # Every convolution uses the first group: more users than a program sums at a time.
    "many": ([16] * 5, [ConvolutionGroups((g % 5,), (0,), 0, 1 + g % 3) for g in range(150)]),
}


def native_device() -> str:
    return DEVICE if DEVICE == "cpu" or native.build_info()["cuda"] else "cpu"


@pytest.fixture(params=["reference", "fused", "native"])
def backend(request):
    return request.param


def device_of(backend):
    return native_device() if backend == "native" else DEVICE


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that was not written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def structure_of(name, device="cpu"):
    return MaskStructure.of(*STRUCTURES[name], device=device)


def draw(name, scale, seed=0):
    """Logits between which the scaled sigmoid is small, medium, large and saturated; and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    channels = structure_of(name).channels
    logits = torch.randn(channels, generator=generator, dtype=torch.float64) * 10 / scale
    return logits.float().double(), torch.randn(channels, generator=generator, dtype=torch.float64).float().double()


def results(backend, name, logits, scale, dtype, upstream=None, weight=None):
    """Return masks, loss and the gradient of Σ upstream·m + weight·L_S, on the CPU."""
    device = device_of(backend)
    leaf = logits.to(device, dtype).requires_grad_()
    masks, loss = masks_and_sparsity(leaf, scale, structure_of(name, device), backend=backend)
    assert masks.dtype == loss.dtype == dtype and masks.shape == leaf.shape and loss.shape == ()
    total = torch.zeros((), dtype=dtype, device=device)
    if upstream is not None:
        total = total + (masks * upstream.to(device, dtype)).sum()
    if weight is not None:
        total = total + weight * loss
    (gradient,) = torch.autograd.grad(total, leaf) if upstream is not None or weight is not None else (leaf.detach(),)
    return masks.detach().cpu(), loss.detach().cpu(), gradient.cpu()


def truth(name, logits, scale, upstream=None, weight=None):
    leaf = logits.clone().requires_grad_()
    structure = structure_of(name)
    masks = channel_masks(leaf, scale)
    loss = sparsity_loss(masks, **structure.terms(torch.float64))
    total = (masks * upstream).sum() if upstream is not None else 0.0
    (gradient,) = torch.autograd.grad(total + (weight or 0.0) * loss, leaf)
    return masks.detach(), loss.detach(), gradient


def slope(x):
    """σ(x)[1 − σ(x)], correctly rounded: in decimals, which do not underflow."""
    power = (-abs(Decimal(x))).exp()
    return float(power / (1 + power) ** 2)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_double_precision_is_the_reference(backend, name, scale):
    logits, upstream = draw(name, scale)
    for parts in ((upstream, None), (None, 0.7), (upstream, 0.7)):
        masks, loss, gradient = results(backend, name, logits, scale, torch.float64, *parts)
        exact = truth(name, logits, scale, *parts)
        torch.testing.assert_close(masks, exact[0], rtol=1e-14, atol=0)
        torch.testing.assert_close(loss, exact[1], rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, exact[2], rtol=1e-12, atol=1e-15 * float(exact[2].abs().max()))


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_single_precision_is_no_worse_than_eager(backend, name, scale):
    logits, upstream = draw(name, scale, seed=1)
    # The product in single precision is part of the definition: at s = 100 its rounding moves a mask by more than anything else.
    scaled = (logits.float() * torch.tensor(scale)).double()
    exact_masks = torch.where(torch.sigmoid(scaled) < SNAP, torch.zeros_like(scaled), torch.sigmoid(scaled))
    masks, loss, gradient = results(backend, name, logits, scale, torch.float32, upstream, 0.7)
    eager = results("reference", name, logits, scale, torch.float32, upstream, 0.7)
    safe = (scaled.sigmoid() / SNAP - 1).abs() > 1e-5
    error, allowed = ((found[safe] - exact_masks[safe]).abs().max() for found in (masks, eager[0]))
    assert float(error) <= max(2 * float(allowed), FLOOR)
    assert bool(((masks == 0) | (masks >= SNAP)).all())
    exact_loss = sparsity_loss(exact_masks, **structure_of(name).terms(torch.float64))
    assert float((loss - exact_loss).abs()) <= max(2 * float((eager[1] - exact_loss).abs()), FLOOR * float(exact_loss))
    exact = truth(name, logits, scale, upstream, 0.7)[2]
    size = float((upstream.abs().max() + 0.7) / 4)
    assert float((gradient - exact).abs().max()) <= max(2 * float((eager[2] - exact).abs().max()), FLOOR * size)


@pytest.mark.parametrize(("scale", "size"), [(1000.0, 1.0), (100.0, 10.0), (400.0, 2.5), (1.0, 1000.0)])
def test_exact_in_double_precision_where_the_sigmoid_saturates(backend, scale, size):
    channels = structure_of("odd").channels
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0] * 5, dtype=torch.float64)[:channels]
    upstream = torch.linspace(-7, 3, channels, dtype=torch.float64)
    masks, loss, task = results(backend, "odd", signs * size, scale, torch.float64, upstream)
    assert masks.tolist() == (signs > 0).double().tolist()
    assert task.tolist() == pytest.approx((upstream * slope(size)).tolist(), rel=1e-15, abs=0)
    full, leaf = truth("odd", signs * size, scale)[1], masks.clone().requires_grad_()
    (at_masks,) = torch.autograd.grad(sparsity_loss(leaf, **structure_of("odd").terms(torch.float64)), leaf)
    assert float(loss) == pytest.approx(float(full), rel=1e-14)
    sparsity = results(backend, "odd", signs * size, scale, torch.float64, None, 1.0)[2]
    assert sparsity.tolist() == pytest.approx((at_masks * slope(size)).tolist(), rel=1e-14, abs=0)


def test_the_loss_spans_zero_to_one_and_half_way_masks_are_exact(backend):
    for name in STRUCTURES:
        zeros = torch.zeros(structure_of(name).channels)
        assert float(results(backend, name, zeros + 5, 100.0, torch.float32)[1]) == 1.0
        assert float(results(backend, name, zeros - 5, 100.0, torch.float32)[1]) == 0.0
        assert torch.equal(results(backend, name, zeros, 100.0, torch.float32)[0], zeros + 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_is_a_number_or_a_tensor_that_is_read_when_the_masks_are_made(backend, dtype):
    device = device_of(backend)
    structure = structure_of("odd", device)
    logits = draw("odd", 7.5)[0].to(device, dtype)
    scale = torch.tensor([7.5], dtype=torch.float32, device=device)
    first = masks_and_sparsity(logits, scale, structure, backend=backend)
    by_number = masks_and_sparsity(logits, 7.5, structure, backend=backend)
    assert torch.equal(first[0], by_number[0]) and torch.equal(first[1], by_number[1])
    scale.fill_(50.0)
    again = masks_and_sparsity(logits, scale, structure, backend=backend)
    assert torch.equal(again[0], masks_and_sparsity(logits, 50.0, structure, backend=backend)[0])
    assert not torch.equal(again[0], first[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_finite_number_stays_in_its_channel_and_in_the_loss(backend, value):
    logits = torch.full((structure_of("odd").channels,), 0.5)
    logits[3] = value
    masks, loss, gradient = results(backend, "odd", logits, 10.0, torch.float32, torch.ones_like(logits))
    expected = {math.inf: 1.0, -math.inf: 0.0}
    others = [c for c in range(len(logits)) if c != 3]
    assert bool(masks[others].isfinite().all()) and bool(gradient[others].isfinite().all())
    if math.isnan(value):
        assert bool(masks[3].isnan()) and bool(loss.isnan()) and bool(gradient[3].isnan())
    else:
        assert float(masks[3]) == expected[value] and float(gradient[3]) == 0.0 and bool(loss.isfinite())


def test_gradients_that_autograd_hands_over_without_memory_of_their_own(backend):
    # The gradient of a sum is one number that every channel shares.
    logits, _ = draw("rows", 1.0)
    device = device_of(backend)
    leaf = logits.to(device).requires_grad_()
    masks, loss = masks_and_sparsity(leaf, 1.0, structure_of("rows", device), backend=backend)
    masks.sum().backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad.cpu(), torch.sigmoid(logits) * torch.sigmoid(-logits), rtol=1e-13, atol=0)
    leaf.grad = None
    loss.backward()
    assert bool((leaf.grad[:-5] > 0).all())
    assert bool((leaf.grad[-5:] == 0).all()), "no convolution uses the last channels"


def test_reference_is_made_of_the_two_functions():
    logits, upstream = draw("odd", 3.0)
    structure = structure_of("odd")
    masks, loss, gradient = results("reference", "odd", logits, 3.0, torch.float32, upstream, 0.3)
    leaf = logits.float().requires_grad_()
    own = channel_masks(leaf, 3.0)
    own_loss = sparsity_loss(own, **structure.terms(torch.float32))
    ((own * upstream.float()).sum() + 0.3 * own_loss).backward()
    assert torch.equal(own, masks) and torch.equal(own_loss, loss) and torch.equal(leaf.grad, gradient)


def test_tables_by_hand():
    convs = [ConvolutionGroups((), (0,), 3, 9), ConvolutionGroups((0,), (0, 1), 0, 4), ConvolutionGroups((0, 1), (1,), 0, 1)]
    structure = MaskStructure.of([3, 130], convs)
    assert structure.channels == 133 and structure.span == 2
    assert structure.full == 9 * 3 * 3 + 4 * 3 * 133 + 133 * 130
    assert structure.rows.tolist() == [[0, 3, 0], [3, 131, 1], [131, 133, 1]] and structure.row_offsets.tolist() == [0, 1, 3]
    assert structure.convs.tolist() == [[3, 9, -1, -1, 0, -1], [0, 4, 0, -1, 0, 1], [0, 1, 0, 1, 1, -1]]
    # Across from what group 0 reads lies what is written (3 + l), and the other way round.
    assert structure.user_offsets.tolist() == [0, 4, 7]
    assert sorted(structure.users[:4].tolist()) == [0, 1, 4, 5] and sorted(structure.users[4:].tolist()) == [1, 2, 5]
    assert all(getattr(structure, name).dtype == torch.int32 for name in ("rows", "row_offsets", "convs", "user_offsets", "users"))


@pytest.mark.parametrize(
    ("widths", "convs", "words"),
    [
        ([], [ConvolutionGroups((), (0,), 3, 9)], "needs groups and convolutions; got 0 and 1"),
        ([4], [], "needs groups and convolutions; got 1 and 0"),
        ([4, -1], [ConvolutionGroups((), (0,), 3, 9)], "widths must be ≥ 0; group 1 has -1"),
        ([4], [ConvolutionGroups((), (1,), 3, 9)], r"convolution 0 writes groups \(1,\): they must be distinct and lie in 0 … 0"),
        ([4], [ConvolutionGroups((0, 0), (0,), 0, 9)], r"convolution 0 reads groups \(0, 0\)"),
        ([4], [ConvolutionGroups((), (0,), -1, 9)], "convolution 0 needs image ≥ 0"),
        ([4], [ConvolutionGroups((), (0,), 3, 0)], "area ≥ 1, not 3 and 0"),
        ([0], [ConvolutionGroups((), (0,), 3, 9)], "the network has no parameters"),
    ],
)
def test_networks_that_make_no_sense_are_refused(widths, convs, words):
    with pytest.raises(ValueError, match=words):
        MaskStructure.of(widths, convs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backend": "cuda"}, "channel_masks: unknown backend 'cuda': choose from reference, fused, native"),
        ({"logits": torch.zeros(22)}, r"logits must be .* one per channel of the structure \(23\); got torch.float32, \(22,\)"),
        ({"logits": torch.zeros(23).half()}, "logits must be float32 or float64.* got torch.float16"),
        ({"logits": torch.zeros(23, dtype=torch.int64)}, "got torch.int64"),
        ({"logits": torch.zeros(46)[::2]}, r"contiguous.*strides \(2,\)"),
        ({"logits": torch.zeros(23, 1)}, r"\(23, 1\)"),
        ({"logits": torch.zeros(23, device="meta")}, "tables lie on .*, the logits on meta; use structure.to"),
        ({"scale": torch.ones(2)}, r"scale must be a number or .* one element.*got torch.float32, \(2,\)"),
        ({"scale": torch.tensor(3)}, "scale must be .*got torch.int64"),
        ({"scale": torch.ones((), device="meta")}, "on cpu; got torch.float32, .* on meta"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, words):
    arguments = {"logits": torch.zeros(23), "scale": 1.0, "structure": structure_of("odd"), **change}
    with pytest.raises(ValueError, match=words):
        masks_and_sparsity(**arguments)


def test_without_triton_the_fused_backend_says_so(monkeypatch):
    monkeypatch.setattr(triton_runtime, "usable", lambda device: (False, "Triton is not installed (gone)"))
    with pytest.raises(BackendError, match="channel_masks cannot run here: Triton is not installed.*'reference' or 'auto'"):
        masks_and_sparsity(torch.zeros(23), 1.0, structure_of("odd"), backend="fused")


def test_without_the_native_module_the_native_backend_says_so(monkeypatch):
    monkeypatch.setattr(native, "MODULE", "der_fast._no_such_module")
    native._load.cache_clear()
    with pytest.raises(BackendError, match="_no_such_module is not there"):
        masks_and_sparsity(torch.zeros(23), 1.0, structure_of("odd"), backend="native")
    monkeypatch.undo()
    native._load.cache_clear()


def native_arguments(**change):
    structure = structure_of("odd")
    tables = [structure.rows, structure.row_offsets, structure.convs, structure.user_offsets, structure.users]
    logits = torch.zeros(23)
    found = {
        "structure": (*(native.facts_of(table) for table in tables), structure.full),
        "logits": native.facts_of(logits),
        "scale": native.facts_of(torch.ones(1)),
        "masks": native.facts_of(torch.empty(23)),
        "loss": native.facts_of(torch.empty(1)),
        "work": native.facts_of(torch.empty(4 + 4 + 12, dtype=torch.float64)),
    }
    keep = [tables, logits]
    for name, value in change.items():
        position = {"rows": 0, "row_offsets": 1, "convs": 2, "user_offsets": 3, "users": 4, "full": 5}.get(name)
        facts = native.facts_of(value) if isinstance(value, torch.Tensor) else value
        if position is None:
            found[name] = facts
        else:
            found["structure"] = (*found["structure"][:position], facts, *found["structure"][position + 1 :])
        keep.append(value)
    return found, keep


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"structure": ()}, r"structure must be \(rows, row_offsets, convs, user_offsets, users, full\)"),
        ({"rows": torch.zeros(4, 2, dtype=torch.int32)}, "rows must have 3 columns, not 2"),
        ({"rows": torch.zeros(4, 3)}, "rows must be contiguous int32 of 2 dimension"),
        ({"rows": torch.zeros(4, 3, dtype=torch.int32)}, "rows is wrong at entry 0"),
        ({"row_offsets": torch.zeros(1, dtype=torch.int32)}, "row_offsets must have an entry more"),
        ({"convs": torch.zeros(6, 5, dtype=torch.int32)}, "convs must have 2 . 2.span columns, not 5"),
        ({"convs": torch.full((6, 6), 4, dtype=torch.int32)}, "convs is wrong at entry 0"),
        ({"user_offsets": torch.zeros(3, dtype=torch.int32)}, "user_offsets must be as long as row_offsets"),
        ({"users": torch.full((15,), 12, dtype=torch.int32)}, "users is wrong at entry 0|user_offsets is wrong"),
        ({"full": 0}, "full must be a whole number from 1 to"),
        ({"full": 1.5}, "full must be a whole number"),
        ({"logits": torch.zeros(23).half()}, "logits must be float32 or float64"),
        ({"logits": torch.zeros(24)}, "masks must have the shape"),
        ({"scale": torch.ones(2)}, "scale must be one float32 number"),
        ({"scale": torch.ones(1).double()}, "scale must be one float32 number"),
        ({"masks": torch.zeros(23).double()}, "masks must be float32, not float64"),
        ({"masks": torch.zeros(46)[::2]}, "masks must be contiguous"),
        ({"loss": torch.zeros(1, dtype=torch.int32)}, "loss must be one float32 number"),
        ({"work": torch.zeros(19, dtype=torch.float64)}, r"work must have the shape \(20\), not \(19\)"),
    ],
)
def test_the_native_module_refuses_by_name(change, words):
    arguments, keep = native_arguments(**change)
    with pytest.raises(ValueError, match=words):
        native.channel_masks_forward(**arguments, device=None, stream=0)
    assert keep


def test_the_native_backend_on_a_device_says_what_is_missing():
    if native.build_info()["cuda"]:
        pytest.skip("this build has CUDA: there is nothing to refuse")
    arguments, keep = native_arguments()
    with pytest.raises(BackendError, match="built without CUDA"):
        native.channel_masks_forward(**arguments, device=0, stream=0)
    assert keep


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.gpu
@needs_gpu
class TestOnCuda:
    @staticmethod
    def large():
        generator = torch.Generator().manual_seed(4)
        widths = torch.randint(0, 300, (160,), generator=generator).tolist()
        convs = [ConvolutionGroups((), (0, 1), 3, 49), *(ConvolutionGroups((g, (g + 7) % 160), (g + 1,), 0, 9) for g in range(150))]
        structure = MaskStructure.of(widths, convs, device="cuda")
        return structure, torch.randn(structure.channels, generator=generator).cuda()

    @staticmethod
    def skip_without(backend):
        if backend == "native" and not native.build_info()["cuda"]:
            pytest.skip("der_fast._C was built without CUDA")

    @pytest.mark.parametrize("backend", ["fused", "native"])
    def test_a_large_network_twenty_times(self, backend):
        self.skip_without(backend)
        structure, logits = self.large()
        expected = [value.detach() for value in masks_and_sparsity(logits.double(), 30.0, structure)]
        upstream, first = torch.randn_like(logits), None
        for _ in range(20):
            leaf = logits.clone().requires_grad_()
            masks, loss = masks_and_sparsity(leaf, 30.0, structure, backend=backend)
            (gradient,) = torch.autograd.grad((masks * upstream).sum() + 0.3 * loss, leaf)
            found = [masks.detach(), loss.detach(), gradient]
            first = first or found
            assert all(torch.equal(*pair) for pair in zip(first, found, strict=True))
        # The product s·e in single precision is off by up to 2⁻²⁴·|s·e|, and σ is steepest at 0.
        torch.testing.assert_close(first[0].double(), expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(first[1].double(), expected[1], rtol=1e-5, atol=0)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_native_backend_has_the_bits_of_the_cpu(self, dtype):
        self.skip_without("native")
        structure, logits = self.large()
        found = []
        for device in ("cpu", "cuda"):
            leaf = logits.to(device, dtype).requires_grad_()
            masks, loss = masks_and_sparsity(leaf, 30.0, structure.to(device), backend="native")
            upstream = torch.linspace(-1, 1, len(leaf), dtype=torch.float64).to(device, dtype)
            (gradient,) = torch.autograd.grad([masks, loss], leaf, [upstream, torch.full_like(loss, 0.3)])
            found.append([masks.detach().cpu(), loss.detach().cpu(), gradient.cpu()])
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))

    @pytest.mark.parametrize("backend", ["fused", "native"])
    def test_a_captured_graph_replays_with_another_scale(self, backend):
        self.skip_without(backend)
        structure, logits = self.large()
        scale, leaf = torch.tensor(2.0, device="cuda"), logits.clone().requires_grad_()

        def step():
            masks, loss = masks_and_sparsity(leaf, scale, structure, backend=backend)
            (gradient,) = torch.autograd.grad(masks.square().sum() + loss, leaf)
            return masks.detach(), loss.detach(), gradient

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = step()
        for value in (0.5, 80.0):
            scale.fill_(value)
            graph.replay()
            replayed = [tensor.clone() for tensor in held]
            assert all(torch.equal(*pair) for pair in zip(replayed, step(), strict=True))
