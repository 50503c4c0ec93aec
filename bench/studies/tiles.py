"""How good the convolutions' default tiles are: times every candidate of `kernels.conv` on this device, plain and as in the chain.

    python -m bench tiles --device cuda --json bench/results/tiles.jsonl [--quick]

'chain' is the convolution as in the training step: in the forward pass with statistics and the previous layer's affine map and ReLU; in
the backward pass with batch-norm's backward on load and the previous layer's sums on store. Times are medians of CUDA graph replays with
a warm L2 cache. `auto` measures only the likeliest of these, and for a bounded time: copy the results by hand into
`kernels.conv.launch.default_config`, so that nobody waits for a search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness.arguments import study_parser
from bench.harness.facts import facts_of
from bench.harness.registry import Setting
from bench.harness.runner import append
from bench.subjects.shapes import ConvLayer, batches, layers
from der_fast.kernels import triton_runtime
from der_fast.kernels.affine import Affine
from der_fast.kernels.backend import resolve_device
from der_fast.kernels.conv import ConvShape, ConvTiles, candidates, conv_dgrad, conv_forward, conv_wgrad, default_split
from der_fast.kernels.conv.launch import DIRECTIONS
from der_fast.kernels.device import capability, multiprocessors
from der_fast.kernels.timing import measure

# A first search skips unlikely candidates; `--quick` takes every third one.
QUICK = 3


@dataclass(frozen=True)
class Problem:
    """One convolution in one direction, in the chain or plain, and the tiles that may compute it."""

    layer: ConvLayer
    batch: int
    direction: str
    chained: bool

    @property
    def shape(self) -> ConvShape:
        """The shape as the kernels see it."""
        layer = self.layer
        return ConvShape(self.batch, layer.inputs, layer.side, layer.side, layer.outputs, layer.kernel, layer.stride)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.direction} {self.layer.name} batch {self.batch} {'chain' if self.chained else 'plain'}"

    def tiles(self, device: torch.device, quick: bool) -> dict[str, tuple[ConvTiles, int | None]]:
        """Return the candidates to time, the default first: tiles, and for wgrad the number of parts of its sum (None elsewhere)."""
        count = multiprocessors(device)
        configs = candidates(
            self.direction, self.shape, torch.bfloat16, transformed=self.chained, processors=count, capability=capability(device)
        )
        configs = configs[:1] + configs[1 :: QUICK if quick else 1]
        if self.direction != "wgrad":
            return {config.name: (config, None) for config in configs}
        found = [(config, default_split(self.shape, config, count, transformed=self.chained)) for config in configs]
        first, usual = found[0]
        found[1:1] = [(first, split) for split in dict.fromkeys((max(1, usual // 2), usual * 2)) if split != usual]
        return {f"{config.name} split {split}": (config, split) for config, split in found}


def problems(setting: Setting) -> Iterator[Problem]:
    """Yield every problem to search; the image needs no gradient."""
    for batch in batches(setting):
        for layer in layers(setting):
            for direction in DIRECTIONS:
                for chained in (True, False):
                    if not (layer.name == "stem" and direction == "dgrad"):
                        yield Problem(layer, batch, direction, chained)


def runs(problem: Problem, device: torch.device, quick: bool) -> dict[str, Callable[[], object]]:
    """Return one call per candidate, all on the same tensors."""
    layer, batch, chained = problem.layer, problem.batch, problem.chained
    generator = torch.Generator().manual_seed(0)

    def image(channels: int, side: int) -> Tensor:
        drawn = torch.randn(batch, channels, side, side, generator=generator).to(device, torch.bfloat16)
        return drawn.contiguous(memory_format=torch.channels_last)

    def vector(*shape: int) -> Tensor:
        return (1 + 0.1 * torch.randn(*shape, generator=generator)).to(device)

    x, g, y = image(layer.inputs, layer.side), image(layer.outputs, layer.out_side), image(layer.outputs, layer.out_side)
    weight = torch.randn(layer.outputs, layer.inputs, layer.kernel, layer.kernel, generator=generator).to(device, torch.bfloat16)
    weight = weight.contiguous(memory_format=torch.channels_last)
    affine = Affine(*(vector(layer.inputs) for _ in range(4)))
    prologue = (affine.scale, affine.shift) if chained else None
    g_affine = (vector(3, layer.outputs), y) if chained else None
    common: dict[str, Any] = {"stride": layer.stride, "backend": "fused"}

    def one(config: ConvTiles, split: int | None) -> Callable[[], object]:
        if problem.direction == "forward":
            return lambda: conv_forward(x, weight, prologue=prologue, statistics=chained, config=config, **common)
        if problem.direction == "dgrad":
            epilogue = (x, affine) if chained else None
            return lambda: conv_dgrad(g, weight, (layer.side, layer.side), g_affine=g_affine, epilogue=epilogue, config=config, **common)
        return lambda: conv_wgrad(x, g, layer.kernel, prologue=prologue, g_affine=g_affine, split=split, config=config, **common)

    return {name: one(*tiles) for name, tiles in problem.tiles(device, quick).items()}


def search(problem: Problem, device: torch.device, quick: bool) -> dict[str, Any]:
    """Time all candidates of a problem; return a record with the milliseconds of each."""
    todo = runs(problem, device, quick)
    times = measure(todo, device)
    default = next(iter(todo))
    best = min(times, key=times.__getitem__)
    return {
        "kind": "tiles",
        "layer": asdict(problem.layer),
        "batch": problem.batch,
        "direction": problem.direction,
        "chained": problem.chained,
        "default": default,
        "best": best,
        # None if the default itself failed, which must then be fixed first.
        "default_over_best": times[default] / times[best] if default in times else None,
        "tflops": problem.layer.flops(problem.batch) / times[best] / 1e9,
        "milliseconds": times,
        "failed": sorted(set(todo) - set(times)),
    }


def line(problem: Problem, record: dict[str, Any]) -> str:
    """Return a record as text."""
    ratio = record["default_over_best"]
    said = "the default fails" if ratio is None else f"default {ratio:.2f} x best"
    failed = f", {len(record['failed'])} failed" if record["failed"] else ""
    return f"{problem.name}: {said}, {record['tflops']:.0f} TFLOP/s: {record['best']}{failed}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Search all problems; return 0."""
    parser = study_parser("tiles", __doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="JSON lines are appended to this file")
    parser.add_argument("--commit", help="name of the commit, for a copy without its repository")
    parser.add_argument("--quick", action="store_true", help="batch 128, the four stages, every third candidate")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to check that it runs")
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    triton_runtime.require(device, "the search for tiles")
    setting = Setting(device, "smoke" if options.smoke else "quick" if options.quick else "full", "fused")
    facts = facts_of(device, options.commit)
    todo = list(problems(setting))
    ratios = []
    for number, problem in enumerate(todo, 1):
        record = search(problem, device, options.quick or options.smoke)
        print(f"[{number}/{len(todo)}] {line(problem, record)}", flush=True)
        if options.json:
            append(options.json, {**record, "facts": facts})
        if record["default_over_best"] is not None:
            ratios.append(record["default_over_best"])
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"defaults take {mean:.2f} x the time of the best tiles (geometric mean of {len(ratios)}), {max(ratios):.2f} x at worst")
    return 0
