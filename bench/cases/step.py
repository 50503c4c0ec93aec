"""Training steps of ResNet-18 with masks, alone and as a full DER step with t − 1 frozen extractors.

A step includes masks, forward pass, loss with sparsity, backward pass, SGD, gradient compensation and clamping. One run is a short epoch;
times are per step. The trained tensors after it are compared with those of the same epoch in float64.

  eager_fp32, eager_bf16, eager_fp16   public style; DER: unpruned frozen networks one after another
  eager_compact                        DER only: the compact frozen networks one after another
  compile                              torch.compile(mode='max-autotune'), which makes CUDA graphs, and fused SGD; DER: at the largest t,
                                       for the new network and the loss, after the compact frozen networks one after another
  ours                                 der_fast's stage, backend auto: the faster of cuDNN and der_fast's kernels as measured
  ours_fused                           der_fast's kernels wherever they can run
  ours_fp32                            the same in float32, for comparison
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.cases.bank import timesteps
from bench.harness.registry import Case, Run, Setting, Tensors, Variant, Work
from bench.subjects.networks import SharedNetworks
from bench.subjects.steps import Task, ours, rival
from der_fast.model.architecture import Architecture


def training_flops(net: Architecture, batch: int, size: int) -> float:
    """Return the multiplications and additions of the convolutions, forward and both gradients; the image needs none."""
    sides: dict[tuple[str, ...], int] = {(): size}
    total = 0.0
    for conv in net.convs():
        side = (sides[conv.source] - 1) // conv.stride + 1
        sides.setdefault(conv.target, side)
        forward = 2.0 * batch * side**2 * net.width(conv.source) * net.width(conv.target) * conv.kernel**2
        total += forward * (3 if conv.source else 2)
    return total


def _variants(task: Task, backend: str, compiles: bool) -> tuple[Variant, ...]:
    half = torch.bfloat16

    def other(name: str, dtype: torch.dtype, baseline: bool = False, frozen: str = "full", note: str = "", **options: bool) -> Variant:
        def prepare(tensors: Tensors) -> Run:
            return rival(task, tensors, dtype, frozen, **options)

        return Variant(name, dtype, prepare, baseline, graphed=False, note=note)

    def own(name: str, chosen: str, note: str, precision: str = "bf16", everywhere: bool = False) -> Variant:
        dtype = half if precision == "bf16" else torch.float32
        prepare = lambda tensors: ours(task, tensors, precision, chosen, everywhere=everywhere)  # noqa: E731
        return Variant(name, dtype, prepare, graphed=False, note=note)

    found = [
        other("eager_fp32", torch.float32, True, note="contiguous", channels_last=False),
        other("eager_bf16", half, True, note="autocast, channels-last"),
    ]
    if task.setting.cuda:
        found.append(other("eager_fp16", torch.float16, True, note="autocast, gradient scaler, channels-last"))
    if task.t > 1:
        found.append(other("eager_compact", half, frozen="compact", note="compact frozen networks one after another"))
    if compiles:
        # With the frozen networks inlined, whose convolutions all have different shapes, compiling would take longer than everything else.
        beside = ", compact frozen networks one after another" if task.t > 1 else ""
        found.append(other("compile", half, frozen="compact", note=f"max-autotune with CUDA graphs, fused SGD{beside}", compile=True))
    if backend == "reference":
        return (*found, own("ours", "reference", "reference backend"), own("ours_fp32", "reference", "reference backend", "fp32"))
    fastest = own("ours", "auto", "fastest as measured, one CUDA graph") if task.setting.cuda else own("ours", "fused", "interpreted")
    everywhere = own("ours_fused", "fused", "der_fast's kernels everywhere", everywhere=True)
    # Without rounding to 16 bits the comparison is a hundred times sharper.
    return (*found, fastest, everywhere, own("ours_fp32", "fused", "der_fast's kernels everywhere", "fp32", everywhere=True))


def _case(setting: Setting, name: str, t: int, batch: int) -> Case:
    task = Task(SharedNetworks(setting), t, batch, setting.pick((20,), (10,), (3,))[0])
    flops = training_flops(task.networks.architecture, batch, task.networks.size)
    params: dict[str, object] = {"batch": batch} if name == "train" else {"t": t, "batch": batch}
    expected: Callable[[Tensors], Tensors] = lambda tensors: rival(task, tensors, torch.float64, channels_last=False)()  # noqa: E731
    return Case(
        f"step.{name}",
        params,
        task.inputs,
        expected,
        _variants(task, setting.backend, compiles=name == "train" or t == max(timesteps(setting))),
        lambda dtype: Work(flops=flops, images=batch),
        timing="launch",
        cold=False,
        batches=task.batches,
        sets=1,
        # Rounding flips ReLUs and, through batch-norm's statistics, changes everything after them, so runs diverge within a few steps.
        floors={torch.float32: 0.02, torch.bfloat16: 0.1, torch.float16: 0.05},
        sanity=1.0,
    )


def cases(setting: Setting) -> list[Case]:
    """Return the group."""
    batches = setting.pick((128, 512), (128,), (6,))
    whole = [_case(setting, "train", 1, batch) for batch in batches]
    return whole + [_case(setting, "der", t, batches[0]) for t in timesteps(setting)]
