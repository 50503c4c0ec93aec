"""One epoch of the representation stage as in CIFAR-100 B0-10: 5,000 new images, plus 2,000 from the memory from the second step on.

Augmentation is included. The data have CIFAR-100's shape but are not CIFAR-100. Times are per batch of 128, from one epoch after a warm-up
epoch.

  eager_bf16     unpruned frozen networks one after another, images from a DataLoader with PIL in worker processes
  eager_ready    the same step with batches ready on the device: what remains if the loader costs nothing
  ours           der_fast's stage, augmentation on the device
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.cases.bank import timesteps
from bench.harness.registry import Case, Run, Setting, Tensors, Variant, Work
from bench.subjects import loader
from bench.subjects.networks import SharedNetworks
from bench.subjects.steps import LARGEST_SCALE, Rival, Task, ours
from der_fast.training.schedule import mask_scale

NEW, MEMORY = 5000, 2000


def batches_at(t: int, batch: int) -> int:
    """Return the full batches of an epoch."""
    return (NEW + (MEMORY if t > 1 else 0)) // batch


def _counted(run: Callable[[], Tensors]) -> Run:
    """Epochs draw their own random numbers, so the comparison only checks that every loss is finite."""

    def counted() -> Tensors:
        return {"finite": torch.isfinite(run()["loss"].detach().cpu()).double().reshape(1)}

    return counted


def _from_loader(task: Task, tensors: Tensors) -> Run:
    made = Rival(task, tensors, torch.bfloat16)
    device = task.setting.device
    workers = 0 if task.setting.smoke else None

    def run() -> Tensors:
        total = torch.zeros((), device=device)
        drawn = loader.batches(tensors["pixels"], tensors["labels"], task.batch, device, workers)
        for number, (images, labels) in enumerate(drawn, 1):
            images = images.contiguous(memory_format=torch.channels_last)
            total += made.step(images, labels, mask_scale(number, task.batches, LARGEST_SCALE))
        return {"loss": total}

    return run


def _ready(task: Task, tensors: Tensors) -> Run:
    made = Rival(task, tensors, torch.bfloat16)
    return lambda: {"loss": made.epoch()}


def _warm(make: Callable[[Task, Tensors], Run], task: Task) -> Callable[[Tensors], Run]:
    return lambda tensors: _counted(make(task, tensors))


def _ours(task: Task, tensors: Tensors) -> Run:
    backend = task.setting.backend
    return ours(task, tensors, "bf16", "auto" if task.setting.cuda and backend == "fused" else backend)


def _case(setting: Setting, t: int) -> Case:
    batch = setting.pick((128,), (128,), (6,))[0]
    task = Task(SharedNetworks(setting), t, batch, 2 if setting.smoke else batches_at(t, batch), augment=True)
    half = torch.bfloat16
    variants = (
        Variant("eager_bf16", half, _warm(_from_loader, task), graphed=False, note="DataLoader with PIL, unpruned networks in a loop"),
        Variant("eager_ready", half, _warm(_ready, task), graphed=False, note="ready batches, unpruned networks in a loop"),
        Variant("ours", half, _warm(_ours, task), graphed=False, note="augmentation on the device"),
    )
    return Case(
        "epoch.train",
        {"t": t, "batch": batch},
        task.inputs,
        lambda tensors: {"finite": torch.ones(1, dtype=torch.float64)},
        variants,
        lambda _: Work(images=batch),
        timing="once",
        cold=False,
        batches=task.batches,
        sets=1,
    )


def cases(setting: Setting) -> list[Case]:
    """Return the group."""
    return [_case(setting, t) for t in timesteps(setting)]
