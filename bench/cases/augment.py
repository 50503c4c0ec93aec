"""Random crop, flip, brightness and normalisation of a batch of CIFAR-sized uint8 images from a resident data set.

loader     public code: PIL in the worker processes of a DataLoader; a whole epoch, per image
eager      the same formula in eager PyTorch on the device; its random numbers are drawn beforehand, in its favour
ours       one launch of der_fast's kernel, which draws its random numbers itself
"""

from __future__ import annotations

import itertools

import torch

from bench.harness.registry import Case, Run, Setting, Tensors, Variant, Work
from bench.subjects import loader
from bench.subjects.networks import SharedNetworks
from bench.subjects.shapes import batches
from der_fast.kernels.augment import augment, augment_drawn, draw_augmentation

# The random numbers' seed and stream.
KEY = (1993, 7)


def _eager(tensors: Tensors, dtype: torch.dtype) -> Run:
    row, col, flip, brightness = draw_augmentation(*KEY, tensors["numbers"], padding=loader.PADDING, jitter=loader.BRIGHTNESS, flip=True)

    def run() -> Tensors:
        images = augment(
            tensors["images"],
            row=row,
            col=col,
            flip=flip,
            brightness=brightness,
            padding=loader.PADDING,
            mean=loader.MEAN,
            std=loader.STD,
            index=tensors["index"],
            dtype=dtype,
            backend="reference",
        )
        return {"images": images}

    return run


def _own(setting: Setting, tensors: Tensors, dtype: torch.dtype) -> Run:
    key = torch.tensor(KEY, device=setting.device) if setting.backend == "fused" else KEY

    def run() -> Tensors:
        images = augment_drawn(
            tensors["images"],
            key=key,
            numbers=tensors["numbers"],
            padding=loader.PADDING,
            jitter=loader.BRIGHTNESS,
            flip=True,
            mean=loader.MEAN,
            std=loader.STD,
            index=tensors["index"],
            dtype=dtype,
            backend=setting.backend,
        )
        return {"images": images}

    return run


def _case(setting: Setting, batch: int) -> Case:
    networks, half = SharedNetworks(setting), torch.bfloat16
    resident = setting.pick((5000,), (5000,), (2 * batch,))[0]

    def inputs(generator: torch.Generator) -> Tensors:
        order = torch.randperm(resident, generator=generator, device=generator.device)[:batch]
        numbers = torch.arange(batch, device=generator.device)
        return {"images": networks.pixels(resident, generator), "index": order, "numbers": numbers}

    def work(dtype: torch.dtype) -> Work:
        numbers = batch * 3 * networks.size**2
        return Work(bytes=float(numbers * (1 + dtype.itemsize)), images=batch)

    variants = (
        # The reference selects the images to mirror and waits for their number, so no graph can be captured.
        Variant("eager_fp32", torch.float32, lambda i: _eager(i, torch.float32), True, graphed=False),
        Variant("eager", half, lambda i: _eager(i, half), True, graphed=False, note="eager PyTorch on the device"),
        Variant("ours", half, lambda i: _own(setting, i, half), deterministic=True, note="one launch"),
        Variant("ours_fp32", torch.float32, lambda i: _own(setting, i, torch.float32), deterministic=True),
    )
    return Case("augment.batch", {"batch": batch}, inputs, lambda tensors: _eager(tensors, torch.float64)(), variants, work)


def _loader_case(setting: Setting, batch: int) -> Case:
    networks, count = SharedNetworks(setting), setting.pick((5000,), (2000,), (8,))[0]

    def inputs(generator: torch.Generator) -> Tensors:
        return {"pixels": networks.pixels(count, generator).cpu(), "labels": torch.zeros(count, dtype=torch.int64)}

    def epoch(tensors: Tensors) -> Run:
        def run() -> Tensors:
            drawn = loader.batches(tensors["pixels"], tensors["labels"], batch, setting.device, 0 if setting.smoke else None)
            seen = sum(len(images) for images, _ in itertools.islice(drawn, count))
            return {"images": torch.tensor([float(seen)], dtype=torch.float64)}

        return run

    return Case(
        "augment.loader",
        {"batch": batch},
        inputs,
        lambda tensors: {"images": torch.tensor([float(count)], dtype=torch.float64)},
        (Variant("loader", torch.float32, epoch, graphed=False, note="PIL in worker processes, including their start"),),
        lambda dtype: Work(images=count),
        timing="once",
        cold=False,
        sets=1,
    )


def cases(setting: Setting) -> list[Case]:
    """Return the group."""
    sizes = batches(setting)
    return [_case(setting, batch) for batch in sizes] + [_loader_case(setting, sizes[0])]
