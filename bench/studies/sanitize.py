"""A short program for compute-sanitizer: every CUDA kernel once, and a few small fused training steps.

    compute-sanitizer --tool memcheck --target-processes application-only --error-exitcode 3 python -m bench sanitize
    compute-sanitizer --tool racecheck --target-processes application-only --error-exitcode 3 python -m bench sanitize

With PYTORCH_NO_CUDA_MEMORY_CACHING=1 every tensor is a separate allocation, so that reads past its end are noticed. Such an allocation is
impossible while a CUDA graph is captured, and the checker sees the launches of a replay less well. So nothing is captured here: steps that
training would capture are launched one kernel at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bench.harness.arguments import study_parser
from bench.harness.gate import gated
from bench.harness.registry import Setting, cases_of, seeded
from bench.subjects.networks import SharedNetworks
from bench.subjects.steps import Task, ours
from der_fast.kernels import capture

GROUPS = ("compact", "channel_masks", "masked_bn", "conv", "bank", "augment")


# More than run before training captures its first graph.
BATCHES = 6


def main(arguments: Sequence[str] | None = None) -> int:
    """Run tiny cases of der_fast's kernels, then training steps; return 2 without a GPU."""
    study_parser("sanitize", __doc__).parse_args(arguments)
    if not torch.cuda.is_available():
        print("compute-sanitizer needs a GPU, and there is none")
        return 2
    with capture.off("compute-sanitizer watches single launches"):
        _kernels(Setting(torch.device("cuda", torch.cuda.current_device()), "smoke", "fused"))
    return 0


def _kernels(setting: Setting) -> None:
    for case in cases_of(setting, GROUPS):
        for variant in case.variants:
            if variant.name.startswith("ours"):
                gated(case, variant, case.inputs(seeded(setting.device, 0)))
                print(f"{case.id} {variant.name}", flush=True)
    task = Task(SharedNetworks(setting), 2, 4, BATCHES)
    loss = ours(task, task.inputs(seeded(setting.device, 0)), "bf16", "fused", everywhere=True)()["loss"]
    torch.cuda.synchronize()
    print(f"{BATCHES} fused training steps, loss {float(loss):.4f}")
