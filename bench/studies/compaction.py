"""How long it takes to compact an extractor, and to load the result from disk.

    python -m bench compaction --rounds 20 --json bench/results/compaction.json

For ResNet-18 and ResNet-50, whole and with about 1/12 of their parameters kept: `plan` and `pack` (fp32, channels last; bf16 padded to 8),
and loading the saved file: `Arena.load`, which verifies the checksum, and as a lower bound merely mapping it with safetensors. Each time
is the median over rounds with the 20th and 80th percentile, in milliseconds.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bench.harness.arguments import study_parser
from der_fast import native
from der_fast.compaction import Arena, pack, plan
from der_fast.model.architecture import build_architecture
from der_fast.model.extractor import Extractor
from der_fast.model.layout import MaskLayout

PAPER_SHARE = 1 / 12


def random_masks(layout: MaskLayout, share: float, generator: torch.Generator) -> Tensor:
    """Return binary masks (C,) that leave about `share` of the parameters, thinning every group equally."""
    draw = torch.rand(layout.channels, generator=generator)
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if layout.kept_parameters(draw < middle) > share * layout.architecture.parameters():
            high = middle
        else:
            low = middle
    return draw < low if share < 1 else torch.ones(layout.channels, dtype=torch.bool)


def milliseconds(call: Callable[[], object], rounds: int) -> dict[str, float]:
    """Time `call` after one warm-up round."""
    call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    cuts = statistics.quantiles(times, n=5) if len(times) > 1 else times * 4
    return {"median": statistics.median(times), "p20": cuts[0], "p80": cuts[-1]}


def mapped(path: Path) -> Tensor:
    """Map a file without reading its content."""
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor("arena")
        return tensor


def measure(backbone: str, share: float, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Return the rows of one network at one density."""
    architecture = build_architecture(backbone)
    layout = MaskLayout(architecture)
    network = Extractor(architecture).initialise(torch.Generator().manual_seed(0)).eval()
    keep = random_masks(layout, share, torch.Generator().manual_seed(1))
    decision = plan(layout, keep)
    facts = {"backbone": backbone, "kept_share": decision.parameters / architecture.parameters()}
    rows = [{**facts, "what": "plan", "mb": 0.0, **milliseconds(lambda: plan(layout, keep), rounds)}]
    for dtype, align in ((torch.float32, 1), (torch.bfloat16, 8)):
        arena = pack(network, decision, dtype=dtype, align=align)
        name = f"plan + pack {str(dtype).removeprefix('torch.')}, align {align}"

        def both(dtype: torch.dtype = dtype, align: int = align) -> Arena:
            return pack(network, plan(layout, keep), dtype=dtype, align=align)

        rows.append({**facts, "what": name, "mb": arena.nbytes / 1e6, **milliseconds(both, rounds)})
    path = pack(network, decision).save(folder / "arena.safetensors")
    size = path.stat().st_size / 1e6
    rows.append({**facts, "what": "load", "mb": size, **milliseconds(lambda: Arena.load(path), rounds)})
    rows.append({**facts, "what": "map only", "mb": size, **milliseconds(lambda: mapped(path), rounds)})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("compaction", __doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's number")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for backbone in ("resnet18", "resnet50"):
            for share in (PAPER_SHARE, 1.0):
                rows += measure(backbone, share, options.rounds, Path(folder))
    build = native.build_info()
    print(f"{build['compiler']} {build['flags']}, {torch.get_num_threads()} threads, {options.rounds} rounds")
    print(f"{'network':10} {'kept':>6}  {'what':32} {'MB':>7} {'ms':>8} {'p20':>8} {'p80':>8}")
    for row in rows:
        times = " ".join(f"{row[key]:8.2f}" for key in ("median", "p20", "p80"))
        print(f"{row['backbone']:10} {row['kept_share']:6.1%}  {row['what']:32} {row['mb']:7.2f} {times}")
    if options.json:
        facts = {"build": build, "threads": torch.get_num_threads(), "rounds": options.rounds, "torch": torch.__version__}
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
