"""Strategies for running the frozen extractors on a CPU, including rejected ones.

    python -m bench strategies --extractors 10 --json bench/results/strategies.json
    python -m bench strategies --extractors 3 --compile       # torch.compile with frozen weights too: minutes of compilation

  plain      per extractor PyTorch's convolution, then ReLU (der_fast/compaction/bank/execute.py), channels-last
  fused      per extractor oneDNN's fused convolutions, weights in place
  prepacked  the same, with weights copied once into oneDNN's blocked format
  stems      the same as fused, with all stems as one convolution whose output is copied apart
  grouped    all extractors as one network of grouped convolutions (equal widths)
  traced     torch.jit: traced, frozen, optimize_for_inference
  compiled   torch.compile with frozen weights (--compile)
  lanes      the batch-in-lanes executor

Every ratio is the median of time / plain's time within a round; masks as in `bench growth`. Results are first compared with plain's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.harness.arguments import study_parser
from der_fast.compaction import pack, plan
from der_fast.compaction.bank import lanes
from der_fast.compaction.bank.execute import apply, execute
from der_fast.compaction.bank.onednn import execute_fused
from der_fast.compaction.bank.strategies import Runnable
from der_fast.compaction.program import CONV, FEATURES, IMAGE, Op
from der_fast.config.resolve import resolve_config
from der_fast.model.architecture import build_architecture
from der_fast.model.extractor import Extractor
from der_fast.model.layout import MaskLayout
from der_fast.training.results import versions
from der_fast.training.runtime import apply_runtime

Run = Callable[[], Tensor]


def runnables_of(args: argparse.Namespace) -> list[Runnable]:
    """Compact extractors of equal widths."""
    layout = MaskLayout(build_architecture(args.backbone))
    keep = torch.zeros(layout.channels, dtype=torch.bool)
    for part in layout.by_group(keep).values():
        part[: max(1, round(len(part) * math.sqrt(1 / 12)))] = True
    decision = plan(layout, keep)
    nets = (Extractor(layout.architecture).initialise(torch.Generator().manual_seed(seed)) for seed in range(args.extractors))
    return [Runnable(pack(net.eval(), decision)) for net in nets]


def prepacked(runnable: Runnable) -> dict[str, Tensor]:
    """Weights in oneDNN's own format."""
    reorder, tensors = torch.ops.mkldnn._reorder_convolution_weight, dict(runnable.tensors)
    for op in runnable.arena.ops:
        if op.kind == CONV:
            name = f"{op.target}.weight"
            tensors[name] = reorder(tensors[name], [op.kernel // 2] * 2, [op.stride] * 2, [1, 1], 1, None)
    return tensors


def merged_stems(runnables: list[Runnable], images: Tensor) -> Run:
    """One convolution for all stems, the rest per extractor."""
    stem, *rest = runnables[0].arena.ops
    joined = {
        name: torch.cat([runnable.tensors[name] for runnable in runnables]).contiguous(
            memory_format=torch.channels_last if name.endswith("weight") else torch.contiguous_format
        )
        for name in stem.tensors()
    }
    wide = Op(CONV, FEATURES, IMAGE, 3, stem.outputs * len(runnables), relu=True, kernel=stem.kernel, stride=stem.stride, bias=True)
    joined = {f"{FEATURES}.{name.rpartition('.')[2]}": tensor for name, tensor in joined.items()}

    def run() -> Tensor:
        parts = execute_fused([wide], joined, images).split(stem.outputs, 1)
        # The rest reads the stem's output as its image.
        after = [Op(**{**vars(op), "source": IMAGE if op.source == "stem" else op.source,
                       "residual": IMAGE if op.residual == "stem" else op.residual}) for op in rest]  # fmt: skip
        return torch.cat(
            [
                execute_fused(after, r.tensors, x.contiguous(memory_format=torch.channels_last))
                for r, x in zip(runnables, parts, strict=True)
            ],
            1,
        )

    return run


def grouped(runnables: list[Runnable], images: Tensor) -> Run:
    """All extractors side by side in grouped convolutions."""
    ops, count = runnables[0].arena.ops, len(runnables)
    tensors: dict[str, Tensor] = {}
    for name in runnables[0].tensors:
        joined = torch.cat([runnable.tensors[name] for runnable in runnables])
        tensors[name] = joined.contiguous(memory_format=torch.channels_last) if joined.dim() == 4 else joined
    operator = torch.ops.mkldnn._convolution_pointwise

    def run() -> Tensor:
        values: dict[str, Tensor] = {IMAGE: images}
        for op in ops:
            if op.kind != CONV:
                values[op.target] = apply(op, tensors, values)
                continue
            weight, bias = tensors[f"{op.target}.weight"], tensors[f"{op.target}.bias"]
            where = ([op.kernel // 2] * 2, [op.stride] * 2, [1, 1], 1 if op.source == IMAGE else count)
            if op.residual:
                last = "relu" if op.relu else None
                out = operator.binary(values[op.source], values[op.residual], weight, bias, *where, "add", 1.0, last, [], None)
            else:
                out = operator.default(values[op.source], weight, bias, *where, "relu" if op.relu else "none", [], "")
            values[op.target] = out
        return values[FEATURES]

    return run


class Loop(nn.Module):
    """The plain loop as a module, for tracing and compiling."""

    def __init__(self, runnables: list[Runnable]) -> None:
        super().__init__()
        self.runnables = runnables

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, Σ F)."""
        return torch.cat([execute(runnable.arena.ops, runnable.tensors, images) for runnable in self.runnables], 1)


def runs_of(args: argparse.Namespace, runnables: list[Runnable], images: Tensor) -> dict[str, Run]:
    """Return every strategy, plain first."""
    loop = Loop(runnables).eval()
    packed = [prepacked(runnable) for runnable in runnables]
    traced = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(loop, images, check_trace=False)))
    runs: dict[str, Run] = {
        "plain": lambda: loop(images),
        "fused": lambda: torch.cat([execute_fused(r.arena.ops, r.tensors, images) for r in runnables], 1),
        "prepacked": lambda: torch.cat([execute_fused(r.arena.ops, t, images) for r, t in zip(runnables, packed, strict=True)], 1),
        "stems": merged_stems(runnables, images),
        "grouped": grouped(runnables, images),
        "traced": lambda: traced(images),
    }
    if lanes.available()[0]:
        runs["lanes"] = lambda: lanes.run([runnable.program for runnable in runnables], images, args.threads)
    if args.compile:
        import torch._inductor.config as settings

        settings.freezing = True
        compiled = torch.compile(loop)
        runs["compiled"] = lambda: compiled(images)
    return runs


def measure(args: argparse.Namespace) -> list[Mapping[str, object]]:
    """Compare the results, then time every strategy in turn, round by round."""
    apply_runtime(resolve_config("digits").runtime)
    torch.set_num_threads(args.threads)
    images = torch.randn(args.batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    runs = runs_of(args, runnables_of(args), images)
    expected = runs["plain"]()
    for name, run in runs.items():
        torch.testing.assert_close(
            run(), expected, rtol=0, atol=2e-6 * float(expected.abs().max()), msg=lambda text, name=name: f"{name}: {text}"
        )
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return [
        {
            "strategy": name,
            "ms": 1e3 * statistics.median(times),
            "fastest_ms": 1e3 * min(times),
            "time_over_plain": statistics.median(a / b for a, b in zip(times, seconds["plain"], strict=True)),
        }
        for name, times in seconds.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = study_parser("strategies", __doc__)
    parser.add_argument("--backbone", default="resnet18", choices=["resnet18", "resnet34"])
    parser.add_argument("--extractors", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    with torch.no_grad():
        rows = measure(args)
    for row in rows:
        print(f"{row['strategy']:>10}: {row['ms']:8.1f} ms (fastest {row['fastest_ms']:.1f}), time × {row['time_over_plain']:.3f} of plain")
    if args.json:
        facts = {"backbone": args.backbone, "extractors": args.extractors, "batch": args.batch, "threads": args.threads}
        args.json.write_text(json.dumps({**facts, "rounds": args.rounds, "versions": versions(), "rows": rows}, indent=1) + "\n")
