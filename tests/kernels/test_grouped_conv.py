"""The ragged grouped convolution: the reference against PyTorch extractor by extractor, the fused kernel against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from der_fast.errors import BackendError
from der_fast.kernels import triton_runtime
from der_fast.kernels.grouped_conv import GroupedTiles, GroupMember, default_config, grouped_conv, pack_layer, padded
from der_fast.kernels.grouped_conv.launch import tile_channels
from der_fast.kernels.grouped_conv.layer import ALIGN, FIELDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = GroupedTiles(16, 16, 32)
# Relative to the largest entry: float32 sums of up to 576 products one after another, √576 roundings of 2⁻²⁴ where they do not cancel.
FLOOR = 24 * 2.0**-24


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty is filled with NaN: nothing may be read before it is written, and no padding may be left out."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@dataclasses.dataclass
class Case:
    """A layer in float64 with its input and residual, padded channels zero."""

    parts: list[GroupMember]
    x: torch.Tensor
    residual: torch.Tensor | None
    kernel: int = 3
    stride: int = 1
    residual_stride: int = 1
    relu: bool = True

    def layer(self, dtype=torch.float64, device="cpu"):
        options = {"kernel": self.kernel, "stride": self.stride, "relu": self.relu, "inputs": self.x.shape[1]}
        return pack_layer(self.parts, **options, dtype=dtype, device=torch.device(device))

    def run(self, dtype=torch.float64, backend="reference", device="cpu", **options):
        def here(tensor):
            return None if tensor is None else tensor.to(device, dtype)

        layer, residual = self.layer(dtype, device), here(self.residual)
        options = {"residual": residual, "residual_stride": self.residual_stride, "backend": backend, **options}
        return grouped_conv(here(self.x), layer, **options).cpu()

    def rounded(self, dtype):
        """The same of numbers that `dtype` holds; biases are never less than float32."""

        def near(tensor, dtype=dtype):
            return None if tensor is None else tensor.to(dtype).double()

        parts = [dataclasses.replace(part, weight=near(part.weight), bias=near(part.bias, torch.float32)) for part in self.parts]
        return dataclasses.replace(self, parts=parts, x=near(self.x), residual=near(self.residual))

    def alone(self, dtype=torch.float64, pool=False):
        """What PyTorch makes of each extractor's own channels."""
        results = []
        for part in self.parts:
            x = self.x[:, part.source : part.source + part.inputs].to(dtype)
            bias = part.bias.to(dtype)
            if part.weight is None:
                size = [-(-side // self.stride) for side in x.shape[2:]]
                y = bias[:, None, None].expand(len(x), -1, *size)
            else:
                y = F.conv2d(x, part.weight.to(dtype), bias, self.stride, self.kernel // 2)
            if self.residual is not None:
                step, channels = self.residual_stride, part.residual_channels
                added = self.residual[:, part.residual : part.residual + channels, ::step, ::step].to(dtype)
                y = y + F.pad(added, (0, 0, 0, 0, 0, part.outputs - channels))
            y = y.relu() if self.relu else y
            results.append(y.mean((2, 3)) if pool else y)
        return results


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def case_of(inputs, outputs, *, kernel=3, size=(9, 7), images=2, stride=1, residual=None, residual_stride=1, relu=True, seed=0):
    """Extractors whose widths are `inputs` → `outputs`; those with 0 inputs lost their branch; `residual`: widths of the residual."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def side_by_side(widths, size):
        begins = [sum(map(padded, widths[:index])) for index in range(len(widths))]
        tensor = torch.zeros(images, max(sum(map(padded, widths)), ALIGN), *size, dtype=torch.float64)
        for begin, width in zip(begins, widths, strict=True):
            tensor[:, begin : begin + width] = normal(images, width, *size)
        return begins, channels_last(tensor)

    sources, x = side_by_side(inputs, size)
    targets, _ = side_by_side(outputs, (1, 1))
    added, places, widths = None, [0] * len(inputs), [0] * len(inputs)
    if residual:
        large = [-(-side // stride) * residual_stride - (residual_stride - 1) for side in size]
        places, added = side_by_side(residual, large)
        widths = residual
    parts = [
        GroupMember(normal(wide, narrow, kernel, kernel) if narrow else None, normal(wide), source, target, wide, place, width)
        for narrow, wide, source, target, place, width in zip(inputs, outputs, sources, targets, places, widths, strict=True)
    ]
    return Case(parts, x, added, kernel, stride, residual_stride, relu)


def check(case, dtype=torch.float32, floor=FLOOR, pool=False, config=SMALL):
    """The fused kernel errs at most twice as much as PyTorch does, extractor by extractor; the padding is exactly zero."""
    rounded = dataclasses.replace(
        case,
        parts=[
            dataclasses.replace(
                part, weight=None if part.weight is None else part.weight.to(dtype).double(), bias=part.bias.float().double()
            )
            for part in case.parts
        ],
        x=case.x.to(dtype).double(),
        residual=None if case.residual is None else case.residual.to(dtype).double(),
    )
    found = case.run(dtype, "fused", DEVICE, pool=pool, config=config)
    assert found.dtype == (torch.float32 if pool else dtype)
    assert pool or found.is_contiguous(memory_format=torch.channels_last)
    end = 0
    for part, exact, eager in zip(case.parts, rounded.alone(pool=pool), rounded.alone(dtype, pool=pool), strict=True):
        mine, padding = found[:, part.target :].split([part.outputs, found.shape[1] - part.target - part.outputs], 1)
        assert mine.shape == exact.shape
        largest = exact.abs().max().clamp_min(1e-12)
        allowed = max(2 * float((eager.double() - exact).abs().max() / largest), floor)
        assert float((mine.double() - exact).abs().max() / largest) <= allowed
        end = part.target + padded(part.outputs)
        assert (padding[:, : end - part.target - part.outputs] == 0).all()
    assert found.shape[1] == end
    return found


RAGGED = [([1], [3]), ([17, 3], [1, 64]), ([3, 64, 1, 17, 8], [17, 8, 3, 1, 24])]


@pytest.mark.parametrize(("inputs", "outputs"), RAGGED)
@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_reference_is_a_convolution_of_every_extractor(inputs, outputs, kernel, stride):
    case = case_of(inputs, outputs, kernel=kernel, stride=stride, residual=outputs)
    for pool in (False, True):
        found, expected = case.run(pool=pool), case.alone(pool=pool)
        used = torch.zeros(found.shape[1], dtype=torch.bool)
        for part, exact in zip(case.parts, expected, strict=True):
            here = slice(part.target, part.target + part.outputs)
            torch.testing.assert_close(found[:, here], exact, rtol=1e-12, atol=1e-12)
            used[here] = True
        assert not found[:, ~used].any() and found.dtype == torch.float64


@pytest.mark.parametrize(("inputs", "outputs"), RAGGED)
@pytest.mark.parametrize("stride", [1, 2])
def test_ragged_widths(inputs, outputs, stride):
    check(case_of(inputs, outputs, stride=stride, images=1, residual=outputs if stride == 1 else None), config=GroupedTiles(32, 32, 64))


@pytest.mark.parametrize(
    ("size", "images", "kernel", "stride"), [((1, 1), 1, 3, 1), ((1, 6), 3, 3, 2), ((5, 3), 2, 1, 2), ((2, 2), 5, 7, 1), ((8, 5), 1, 1, 3)]
)
def test_sizes(size, images, kernel, stride):
    check(case_of([5, 9], [9, 3], kernel=kernel, size=size, images=images, stride=stride), config=GroupedTiles(16, 16, 128))


@pytest.mark.parametrize("kernel", [3, 7])
def test_an_image_of_three_channels(kernel):
    case = case_of([8], [40], kernel=kernel, stride=2, images=1)
    case.x = channels_last(case.x[:, :3])
    case.parts = [dataclasses.replace(case.parts[0], weight=case.parts[0].weight[:, :3])]
    assert case.layer().align == 1
    check(case, config=GroupedTiles(32, 16, 64))


@pytest.mark.parametrize("config", [None, GroupedTiles(16, 16, 16), GroupedTiles(64, 16, 32), GroupedTiles(16, 64, 128)])
def test_tiles_do_not_change_what_is_computed(config):
    check(case_of([3, 0, 9], [20, 3, 5], size=(5, 3), images=3, residual=[20, 3, 5]), config=config)


def test_lost_branches():
    check(case_of([0, 17, 0], [3, 9, 17], size=(4, 3), residual=[3, 9, 17]))
    check(case_of([0, 0], [3, 9], size=(4, 3), residual=[3, 9], relu=False))
    check(case_of([0], [3], kernel=1, size=(3, 3)))


def test_a_residual_that_is_widened():
    check(case_of([3, 0, 9], [7, 20, 9], size=(5, 3), residual=[3, 17, 1], residual_stride=2, relu=False))
    # The residual's own size is even here: its last row and column are not read.
    case = case_of([3], [9], size=(4, 2), residual=[3], residual_stride=2)
    case.residual = channels_last(F.pad(case.residual, (0, 1, 0, 1), value=torch.nan))
    check(case)


@pytest.mark.parametrize(("size", "images"), [((1, 1), 17), ((3, 2), 5), ((4, 4), 2), ((9, 4), 2)])
def test_pooling(size, images):
    # 16 rows a tile: many images of one pixel, two of six, one of 16, and parts of one of 36.
    check(case_of([3, 0], [17, 3], size=size, images=images, kernel=1, residual=[17, 3]), pool=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    case = case_of([17, 3, 0], [9, 64, 3], images=1, residual=[9, 64, 3])
    # One rounding of the result.
    check(case, dtype, floor=torch.finfo(dtype).eps / 2, config=GroupedTiles(64, 32, 128))
    # The pooled features are not rounded at all.
    check(case, dtype, pool=True, config=GroupedTiles(64, 32, 128))


def test_an_extractor_never_sees_its_neighbours():
    case = case_of([9, 8, 17], [5, 9, 3], images=1, size=(3, 3), residual=[5, 9, 3])
    clean = case.run(torch.float32, "fused", DEVICE)
    _, middle, last = case.parts
    case.x[:, middle.source : last.source] = torch.nan
    case.residual[:, middle.residual : last.residual] = torch.inf
    found = case.run(torch.float32, "fused", DEVICE)
    assert torch.equal(found[:, : middle.target], clean[:, : middle.target])
    assert torch.equal(found[:, last.target :], clean[:, last.target :])
    assert found[:, middle.target : middle.target + middle.outputs].isnan().all()


@pytest.mark.parametrize("inputs", [3, 8])
def test_not_a_number_reaches_only_the_pixels_that_see_it(inputs):
    # The last block of 128 goes on behind the 9 taps of the kernel.
    case = case_of([inputs], [5], images=3, size=(7, 6))
    case.x[1, 0, 5, 1] = torch.nan
    if inputs == 3:
        case.x = channels_last(case.x[:, :3])
    for pool in (False, True):
        wrong = case.run(torch.float32, "fused", DEVICE, pool=pool, config=GroupedTiles(32, 16, 128)).isnan()
        assert torch.equal(wrong, case.run(pool=pool).isnan()) and wrong.any()


def test_the_same_bits_every_time_and_whatever_extractors_are_beside_it():
    case = case_of([9, 3, 17], [5, 17, 9], images=1, size=(5, 5))
    found = case.run(torch.float32, "fused", DEVICE, pool=True, config=SMALL)
    assert torch.equal(found, case.run(torch.float32, "fused", DEVICE, pool=True, config=SMALL))
    part = case.parts[2]
    alone = Case([dataclasses.replace(part, target=0)], case.x, None)
    expected = alone.run(torch.float32, "fused", DEVICE, pool=True, config=SMALL)
    assert torch.equal(found[:, part.target :], expected)


def test_the_table_has_a_row_for_every_tile_the_longest_first():
    layer = case_of([3, 64, 0, 17], [17, 40, 3, 100], residual=[17, 40, 3, 100]).layer(torch.float32)
    rows = [dict(zip(FIELDS, row, strict=True)) for row in layer.table(32).tolist()]
    lengths = [row["inputs"] for row in rows]
    assert lengths == sorted(lengths, reverse=True) and set(lengths) == {8, 3, 1, 0}
    assert [row["count"] for row in rows] == [2, 2, 4, 4, 4, 4, 1, 1] and [row["first"] for row in rows] == [0, 0, 2, 2, 2, 2, 6, 7]
    assert {(row["target"], row["outputs"]) for row in rows} == {(0, 3), (3, 5), (8, 1), (9, 13)}
    assert layer.table(32) is layer.table(32)


def test_launches_follow_the_shapes():
    narrow, wide = (case_of([8] * 4, [width] * 4).layer(torch.bfloat16) for width in (8, 100))
    assert tile_channels(narrow) == 16 and tile_channels(wide) == 128
    assert default_config(narrow, 100_000).block_m == 128 and default_config(narrow, 1000).block_m == 64
    assert default_config(wide, 100_000).num_warps == 8 and default_config(narrow, 1000).num_warps == 4
    single = case_of([8], [100]).layer(torch.float32)
    assert default_config(wide, 1000).block_k == 64 and default_config(single, 1000) == GroupedTiles(64, 64, 32, num_warps=8)
    with pytest.raises(ValueError, match="block_n must be a power of two of at least 16, not 24"):
        GroupedTiles(16, 24, 16)


def part(**changes):
    usual = {"weight": torch.zeros(4, 3, 3, 3), "bias": torch.zeros(4), "source": 0, "target": 0, "outputs": 4}
    return GroupMember(**{**usual, **changes})


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ([], {}, "at least one part"),
        ([part()], {"dtype": torch.int32}, "dtype must be one of .* not torch.int32"),
        ([part()], {"kernel": 2}, "kernel must be odd and stride at least 1, not 2 and 1"),
        ([part()], {"stride": 0}, "not 3 and 0"),
        ([part(), part(target=8)], {"inputs": 12}, "inputs must be a multiple of 8 where several parts share them, not 12"),
        ([part(source=8)], {"inputs": 11}, "inputs must be a multiple of 8"),
        ([part(outputs=0)], {}, "part 0: outputs must be at least 1, not 0"),
        ([part(), part(target=12)], {}, "part 1: target must be a multiple of 8, not 12"),
        ([part(source=-8)], {}, "part 0: source must be a multiple of 8, not -8"),
        ([part(residual=3)], {}, "part 0: residual must be a multiple of 8, not 3"),
        ([part(residual_channels=5)], {}, r"part 0: residual_channels must lie in \[0, 4\]"),
        ([part(bias=torch.zeros(5))], {}, r"part 0: bias must have the shape \(4,\), not \(5,\)"),
        ([part()], {"kernel": 1}, r"part 0: weight must have the shape \(4, inputs, 1, 1\), not \(4, 3, 3, 3\)"),
        ([part(weight=torch.zeros(5, 3, 3, 3))], {}, r"part 0: weight must have the shape \(4, inputs, 3, 3\)"),
        ([part(source=16)], {}, "part 0 reads channels 16 to 24, but the input has 16"),
        ([part(), part(target=16)], {}, "follow one another: one starts at channel 16, the previous one ends at 8"),
        ([part(), part()], {}, "one starts at channel 0, the previous one ends at 8"),
    ],
)
def test_bad_layers_are_refused(parts, options, message):
    usual = {"kernel": 3, "stride": 1, "relu": True, "inputs": 16, "dtype": torch.float32, "device": torch.device("cpu")}
    with pytest.raises(ValueError, match=message):
        pack_layer(parts, **{**usual, **options})


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_bad_arguments_are_refused(backend):
    case = case_of([3, 9], [5, 9], residual=[5, 9], residual_stride=2)
    layer, plain = case.layer(torch.float32, DEVICE), case_of([3, 9], [5, 9]).layer(torch.float32, DEVICE)
    x, residual = case.x.to(DEVICE, torch.float32), case.residual.to(DEVICE, torch.float32)

    def refused(message, images=x, added=residual, layer=layer, **options):
        with pytest.raises(ValueError, match=message):
            grouped_conv(images, layer, **{"residual": added, "residual_stride": 2, "backend": backend, **options})

    refused(r"x is empty: shape \(0, 24, 9, 7\)", x[:0])
    refused(r"x must be \(N, C, H, W\), not of shape \(24, 9, 7\)", x[0])
    refused("x must be torch.float32 to fit the other tensors, not torch.float64", x.double())
    refused("x is on meta, the other tensors on", x.to("meta"))
    refused(r"x must have channels-last strides, not \(", x.contiguous())
    refused("x must have the layer's 24 channels, not 16", channels_last(x[:, :16]))
    refused("the layer needs a residual", added=None)
    refused("the layer has no residual", layer=plain)
    refused("residual must be torch.float32 to fit the other tensors, not torch.bfloat16", added=residual.bfloat16())
    refused("residual must have channels-last strides", added=residual.contiguous())
    refused("residual_stride must be at least 1, not 0", residual_stride=0)
    refused("of which every 1th row and column make 9 × 7; got 2 of 17 × 13", residual_stride=1)
    refused("residual must have 2 images", added=residual[:1])
    refused("residual must have at least 24 channels, a multiple of 8, not 16", added=channels_last(residual[:, :16]))
    refused("unknown backend 'best': choose from reference, fused", backend="best")


def test_without_triton_the_fused_backend_says_so(monkeypatch):
    monkeypatch.setattr(triton_runtime, "usable", lambda device: (False, "Triton is not installed (gone)"))
    with pytest.raises(BackendError, match="grouped_conv cannot run here: Triton is not installed.*'reference' or 'auto'"):
        case_of([3], [5]).run(torch.float32, "fused", DEVICE)


def test_the_fused_kernel_has_no_float64():
    case = case_of([3], [5])
    with pytest.raises(ValueError, match="no float64: use backend 'reference'"):
        case.run(torch.float64, "fused", DEVICE)
