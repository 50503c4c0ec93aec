"""The frozen bank, t pruned extractors on one batch, and one layer of it alone.

eager       the compact extractors one after another, PyTorch's convolutions, batch-norm folded
eager_full  as in public code: unpruned networks of torch.nn modules one after another (they compute the same)
branches    the compact extractors as parallel branches of one CUDA graph (cuDNN): the fairest rival
ours        der_fast: every layer of all extractors in one launch
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.registry import Case, Run, Setting, Tensors, Variant, Work, drawn, image_like
from bench.subjects.branch import branch
from bench.subjects.networks import SHARE, SharedNetworks
from bench.subjects.shapes import stages
from der_fast.compaction.bank.graphs import Branch, run_beside, run_parallel
from der_fast.compaction.bank.strategies import macs
from der_fast.kernels.grouped_conv import GroupMember, grouped_conv, pack_layer, padded

HALF = torch.bfloat16


def parallel(branches: Sequence[Branch], images: Tensor) -> Branch:
    """Return all branches side by side, each on its own stream."""
    if images.device.type != "cuda":
        return lambda x: torch.cat([one(x) for one in branches], 1)
    streams = [torch.cuda.Stream(images.device) for _ in range(min(len(branches), 8))]
    return lambda x: run_parallel(branches, x, streams)


def ours(networks: SharedNetworks, count: int, dtype: torch.dtype) -> Branch:
    """Return all extractors in one launch per layer."""
    from der_fast.compaction.bank.grouped import GroupedProgram

    return GroupedProgram([networks.compact(number, dtype).arena for number in range(count)], dtype, backend=networks.setting.backend)


class Side:
    """Runs numbered pieces of work concurrently on several streams; one after another without streams or on a CPU."""

    def __init__(self, setting: Setting, streams: int) -> None:
        self._streams = [torch.cuda.Stream(setting.device) for _ in range(streams if setting.cuda else 0)]

    def __call__(self, work: Callable[[int], Tensor], count: int) -> list[Tensor]:
        """Return the results of `work` for 0 … count − 1."""
        works = [functools.partial(work, number) for number in range(count)]
        return run_beside(works, self._streams) if self._streams else [one() for one in works]


def timesteps(setting: Setting) -> tuple[int, ...]:
    """Return the numbers of extractors."""
    return setting.pick((1, 5, 10), (10,), (2,))


def _whole(setting: Setting, count: int, batch: int) -> Case:
    networks = SharedNetworks(setting)

    def inputs(generator: torch.Generator) -> Tensors:
        return {"images": networks.images(batch, generator)}

    def run_of(function: Branch, images: Tensor) -> Run:
        def run() -> Tensors:
            with torch.no_grad():
                return {"features": function(images)}

        return run

    def loop(tensors: Tensors, dtype: torch.dtype) -> Run:
        branches = [branch(networks.compact(number, dtype)) for number in range(count)]
        return run_of(lambda x: torch.cat([one(x) for one in branches], 1), tensors["images"].to(dtype))

    def full(tensors: Tensors, dtype: torch.dtype) -> Run:
        kept = networks.kept_features(count)
        nets = [networks.full(number).to(dtype).to(memory_format=torch.channels_last) for number in range(count)]  # type: ignore[call-overload]
        return run_of(lambda x: torch.cat([net(x) for net in nets], 1).index_select(1, kept), tensors["images"].to(dtype))

    def side_by_side(tensors: Tensors) -> Run:
        images = tensors["images"].to(HALF)
        return run_of(parallel([branch(networks.compact(number, HALF)) for number in range(count)], images), images)

    def own(tensors: Tensors) -> Run:
        return run_of(ours(networks, count, HALF), tensors["images"].to(HALF))

    def expected(tensors: Tensors) -> Tensors:
        return full(tensors, torch.float64)()

    variants = (
        Variant("eager_fp32", torch.float32, lambda i: loop(i, torch.float32), True, note="compact extractors one after another"),
        Variant("eager", HALF, lambda i: loop(i, HALF), True, note="compact extractors one after another, bf16"),
        Variant("eager_full", HALF, lambda i: full(i, HALF), note="unpruned networks one after another, bf16"),
        Variant("branches", HALF, side_by_side, note="parallel cuDNN branches"),
        Variant("ours", HALF, own, deterministic=True),
    )

    @functools.cache
    def multiplications() -> int:
        return sum(macs(networks.compact(number, HALF).arena, networks.size, networks.size) for number in range(count))

    def work(dtype: torch.dtype) -> Work:
        return Work(flops=2.0 * batch * multiplications(), images=batch)

    floors = {torch.float32: 2e-3 if setting.cuda else 1e-4}
    return Case("bank.whole", {"t": count, "batch": batch}, inputs, expected, variants, work, cold=False, sets=2, floors=floors)


@dataclass(frozen=True)
class _Layer:
    """A 3×3 layer of all extractors with residual and ReLU; `widths` channels each, `side` × `side` pixels."""

    setting: Setting
    batch: int
    side: int
    widths: tuple[int, ...]

    @property
    def places(self) -> list[tuple[int, int]]:
        """Where each extractor's channels start when all are side by side, padded, and how many there are."""
        starts = itertools.accumulate((padded(width) for width in self.widths), initial=0)
        return list(zip(starts, self.widths, strict=False))

    def inputs(self, generator: torch.Generator) -> Tensors:
        """Draw input, residual, weight and bias of every extractor."""
        tensors = {}
        for number, width in enumerate(self.widths):
            tensors[f"x{number}"] = drawn(generator, self.batch, width, self.side, self.side).relu()
            tensors[f"h{number}"] = drawn(generator, self.batch, width, self.side, self.side).relu()
            tensors[f"w{number}"] = drawn(generator, width, width, 3, 3, scale=(9 * width) ** -0.5)
            tensors[f"b{number}"] = drawn(generator, width, scale=0.1)
        return {name: tensor.to(self.setting.device) for name, tensor in tensors.items()}

    def library(self, tensors: Tensors, dtype: torch.dtype, streams: int = 0) -> Run:
        """PyTorch's convolutions, one after another or on several streams."""
        count, device = len(self.widths), self.setting.device
        images = [{name: image_like(tensors[f"{name}{number}"], device, dtype) for name in "xhw"} for number in range(count)]
        biases = [tensors[f"b{number}"].to(dtype) for number in range(count)]

        def one(number: int) -> Tensor:
            part = images[number]
            return F.relu(F.conv2d(part["x"], part["w"], biases[number], 1, 1).add_(part["h"]))

        side = Side(self.setting, streams)

        def run() -> Tensors:
            with torch.no_grad():
                return {f"a{number}": value for number, value in enumerate(side(one, count))}

        return run

    def own(self, tensors: Tensors) -> Run:
        """All extractors in one launch."""
        places, device = self.places, self.setting.device
        total = sum(padded(width) for width in self.widths)
        parts = [
            GroupMember(tensors[f"w{n}"], tensors[f"b{n}"], start, start, width, start, width) for n, (start, width) in enumerate(places)
        ]
        layer = pack_layer(parts, kernel=3, stride=1, relu=True, inputs=total, dtype=HALF, device=device)
        x, h = (torch.zeros(self.batch, total, self.side, self.side, device=device) for _ in range(2))
        for number, (start, width) in enumerate(places):
            x[:, start : start + width], h[:, start : start + width] = tensors[f"x{number}"], tensors[f"h{number}"]
        x, h = (image_like(tensor, device, HALF) for tensor in (x, h))

        def run() -> Tensors:
            with torch.no_grad():
                out = grouped_conv(x, layer, residual=h, backend=self.setting.backend)
            return {"a": out}

        return run

    def joined(self, outputs: Tensors) -> Tensors:
        """The extractors' results, side by side."""
        return {"a": torch.cat([outputs[f"a{number}"] for number in range(len(self.widths))], 1)}

    def kept(self, outputs: Tensors) -> Tensors:
        """The result without padding."""
        return {"a": torch.cat([outputs["a"][:, start : start + width] for start, width in self.places], 1)}

    def work(self, dtype: torch.dtype) -> Work:
        """The bytes of input, residual, result and weights, and the operations."""
        pixels = self.batch * self.side**2
        moved = sum(3 * pixels * width + 9 * width**2 for width in self.widths)
        return Work(float(dtype.itemsize * moved), sum(2.0 * pixels * 9 * width**2 for width in self.widths), self.batch)


def _layer(setting: Setting, stage: int, count: int, batch: int) -> Case:
    full, side = stages(setting)[stage]
    channels = max(4, round(full * SHARE))
    # Ragged: widths around the paper's density, as real masks leave them.
    layer = _Layer(setting, batch, side, tuple(channels + (3 * number) % 5 - 2 for number in range(count)))
    variants = (
        Variant("eager", HALF, lambda i: layer.library(i, HALF), True, result=layer.joined, note="cuDNN, one after another"),
        Variant("branches", HALF, lambda i: layer.library(i, HALF, 8), result=layer.joined, note="parallel cuDNN branches"),
        Variant("ours", HALF, layer.own, deterministic=True, result=layer.kept),
    )

    def expected(tensors: Tensors) -> Tensors:
        return layer.joined(layer.library(tensors, torch.float64)())

    params = {"stage": stage, "t": count, "batch": batch}
    return Case("bank.layer", params, layer.inputs, expected, variants, layer.work, sets=2)


def cases(setting: Setting) -> list[Case]:
    """Return the group."""
    batches = setting.pick((128, 512), (128,), (3,))
    whole = [_whole(setting, count, batch) for batch in batches for count in timesteps(setting)]
    return whole + [_layer(setting, stage, max(timesteps(setting)), batches[0]) for stage in stages(setting)]
