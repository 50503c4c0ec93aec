"""What `test_races.py` runs: every Triton kernel of the package in one or two small launches of several programs each.

To add a kernel, or another way to launch one, write a function that calls the public function with backend 'fused' and returns the results,
and put `@case("folder.module.kernel", ...)` above it with every kernel that it launches. Choose shapes that give each launch at least two
programs and a last tile that is not full. The same seed must give the same inputs: the function is called twice.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from der_fast.kernels import masked_bn as passes
from der_fast.kernels.augment import augment, augment_drawn, draw_augmentation
from der_fast.kernels.channel_masks import masks_and_sparsity
from der_fast.kernels.conv import ConvShape, ConvTiles, Parts, add_parts
from der_fast.kernels.grouped_conv import GroupedTiles
from der_fast.kernels.masked_bn.launch import Launch

Results = Sequence[Tensor | None]
CONV, JOINED, BN, GROUPED, MASKS = (
    runpy.run_path(str(Path(__file__).with_name(f"{name}.py")))
    for name in ("test_conv", "test_conv_joined", "test_masked_bn_fused", "test_grouped_conv", "mask_structures")
)
TAPS = ConvTiles(32, 32, 64, num_warps=4, num_stages=2, group=2)
FLAT = ConvTiles(32, 32, 64, num_warps=4, num_stages=2, flat=True)
# N, C, H, W, K, R, stride: odd sizes, several tiles of rows and of columns, blocks that span taps.
CONVOLUTIONS = ((ConvShape(2, 17, 5, 7, 37, 3, 1), TAPS), (ConvShape(3, 34, 7, 5, 36, 3, 2), TAPS), (ConvShape(2, 5, 9, 7, 36, 3, 2), FLAT))


@dataclass(frozen=True)
class RaceCase:
    """A function to run and the kernels that it launches, as folder.module.kernel."""

    kernels: frozenset[str]
    run: Callable[[], Results]


CASES: dict[str, RaceCase] = {}


def case(*kernels: str) -> Callable[[Callable[[], Results]], Callable[[], Results]]:
    def add(run: Callable[[], Results]) -> Callable[[], Results]:
        CASES[run.__name__] = RaceCase(frozenset(kernels), run)
        return run

    return add


def convolutions(name: str, **options: object) -> list[Tensor]:
    found = [CONV[name](CONV["draw"](shape).as_dtype(torch.float32), "fused", tiles, **options) for shape, tiles in CONVOLUTIONS]
    return [tensor for results in found for tensor in (results if isinstance(results, tuple) else (results,))]


@case("conv.triton_forward._conv_forward_kernel")
def conv_forward() -> Results:
    return convolutions("forward")


@case("conv.triton_dgrad._conv_dgrad_kernel")
def conv_dgrad() -> Results:
    return convolutions("dgrad")


@case("conv.triton_dgrad._conv_dgrad_kernel")
def conv_dgrad_joined() -> Results:
    found: list[Tensor | None] = []
    for shape, tiles in CONVOLUTIONS:
        drawn = CONV["draw"](shape)
        added, join = JOINED["draw_join"](drawn, True, True)
        found += JOINED["joined"](drawn.as_dtype(torch.float32), added.float(), JOINED["narrowed"](join, torch.float32), "fused", tiles)
    return found


@case("conv.triton_wgrad._conv_wgrad_kernel", "conv.triton_parts._sum_parts_kernel")
def conv_wgrad_in_parts() -> Results:
    return convolutions("wgrad", split=3)


@case("conv.triton_wgrad._conv_wgrad_kernel")
def conv_wgrad_in_one() -> Results:
    return convolutions("wgrad", split=1)


BOXED = ConvShape(3, 24, 5, 7, 40, 3, 1)


@case("conv.triton_descriptor._conv_descriptor_kernel")
def conv_boxed() -> Results:
    return boxed(1)


@case("conv.triton_descriptor._conv_descriptor_kernel", "conv.triton_descriptor._finish_parts_kernel")
def conv_boxed_in_parts() -> Results:
    return boxed(3)


def boxed(split: int) -> list[Tensor]:
    tiles = ConvTiles(64, 64, 32, boxed=True, split=split)
    inputs = CONV["draw"](BOXED).as_dtype(torch.float16)
    return [*CONV["forward"](inputs, "fused", tiles, prologue=None), *CONV["dgrad"](inputs, "fused", tiles, g_affine=None)]


@case("conv.triton_parts._sum_parts_kernel")
def conv_parts_of_a_block() -> Results:
    generator = torch.Generator().manual_seed(0)
    sizes = ((512, 7), (5, 16), (255, 2), (130, 33), (300, 3))
    pending = [Parts(torch.randn(split, elements, generator=generator), torch.empty(elements)) for elements, split in sizes]
    add_parts(pending)
    return [one.out for one in pending]


STATISTICS = ("masked_bn.triton_forward._statistics_kernel", "masked_bn.triton_vectors._finalize_kernel")
REDUCTIONS = ("masked_bn.triton_backward._reduce_kernel", "masked_bn.triton_vectors._coefficients_kernel")
ELEMENTWISE = ("masked_bn.triton_forward._apply_kernel", "masked_bn.triton_backward._dy_kernel")


@case(*STATISTICS, *REDUCTIONS, *ELEMENTWISE)
def masked_bn_forward_and_backward() -> Results:
    inputs, running, upstream = BN["draw"]((2, 130, 7, 9))
    found, moved = BN["results"](BN["fused"], inputs, running, upstream, True, True)
    return [*found.values(), *moved]


def each_pass(channels: int) -> Results:
    """Several tiles a program, folded rows, the shortcut's second sums; half precision, so that 16-bit stores are recorded too."""
    generator = torch.Generator().manual_seed(channels)
    y, h, g = torch.randn(3, 6, channels, 16, 11, generator=generator).half().unbind()
    y, h, g = (image.contiguous(memory_format=torch.channels_last) for image in (y, h, g))
    weight, bias, mask = torch.rand(3, channels, generator=generator).unbind()
    cut = Launch(16, 64, 3)
    affine, mean, var = passes.finalize(passes.statistics(y, launch=cut, backend="fused"), weight, bias, mask, 1e-5, backend="fused")
    both = (affine.scale, affine.shift)
    out, bits = passes.apply(y, both, residual=h, residual_affine=both, relu=True, keep_bits=True, launch=cut, backend="fused")
    sums, others, gz = passes.backward_reduce(
        g, y, affine, relu_from=bits, shortcut=(h, affine), write_gz=True, launch=cut, backend="fused"
    )
    k, *gradients = passes.backward_coefficients(sums, y.numel() // channels, affine, weight, bias, mask, backend="fused")
    dy = [passes.backward_apply(g, y, k, relu_from=way, affine=affine, launch=cut, backend="fused") for way in ("recompute", bits)]
    return [mean, var, out, bits, sums, others, gz, *gradients, *dy]


@case(*STATISTICS, *REDUCTIONS, *ELEMENTWISE)
def masked_bn_passes_folded() -> Results:
    return each_pass(24)


@case(*STATISTICS, *REDUCTIONS, *ELEMENTWISE)
def masked_bn_passes_of_odd_width() -> Results:
    return each_pass(17)


@case("channel_masks.triton_masks._forward_kernel", "channel_masks.triton_masks._backward_kernel")
def channel_masks() -> Results:
    structure = MASKS["structure_of"]("rows")
    logits = torch.randn(structure.channels, generator=torch.Generator().manual_seed(0)).requires_grad_()
    masks, loss = masks_and_sparsity(logits, 3.0, structure, backend="fused")
    return [masks, loss, *torch.autograd.grad(masks.sum() + loss, logits)]


def banks(**options: object) -> Results:
    """Ragged widths, a lost branch, a stride, a residual."""
    sizes = {"residual": [20, 3, 37], "size": (5, 3), "images": 5}
    found = []
    for stride in (1, 2):
        layer = GROUPED["case_of"]([3, 0, 9], [20, 3, 37], stride=stride, **sizes)
        found.append(layer.run(torch.float32, "fused", config=GroupedTiles(16, 16, 32), **options))
    return found


@case("grouped_conv.triton_forward.grouped_conv_kernel")
def grouped_conv() -> Results:
    return banks()


@case("grouped_conv.triton_forward.grouped_conv_kernel")
def grouped_conv_pooled() -> Results:
    return banks(pool=True)


def augmented(how: str) -> Results:
    """Two programs an image, the second not full."""
    images = torch.randint(0, 256, (4, 21, 19, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    index, numbers = torch.tensor([3, 0, 3]), torch.tensor([7, 1, 2])
    options = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "index": index, "padding": 4, "backend": "fused"}
    drawing = {"padding": 4, "jitter": 0.3, "flip": True}
    if how == "drawn":
        return [augment_drawn(images, key=(1, 2), numbers=numbers, dtype=torch.float16, **options | drawing)]
    return [augment(images, **draw_augmentation(1, 2, numbers, **drawing)._asdict(), **options)]


@case("augment.triton_augment._augment_kernel")
def augment_drawn_in_the_kernel() -> Results:
    return augmented("drawn")


@case("augment.triton_augment._augment_kernel")
def augment_as_given() -> Results:
    return augmented("given")
