"""The one pipeline: decode a window of every image, resize it, mirror, jitter, normalise; on the CPU, or with decoding on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nvidia.dali.fn as fn
import nvidia.dali.math as dali_math
import nvidia.dali.types as types
import torch
from nvidia.dali.pipeline import Pipeline

from der_fast.data.read.walk import ReadSettings

# bfloat16 is converted afterwards: no operator writes it.
_TYPES = {torch.float32: types.FLOAT, torch.bfloat16: types.FLOAT, torch.float16: types.FLOAT16, torch.uint8: types.UINT8}

# Types and dimensions of encoded bytes, window start, window size, mirror and, with jitter, brightness.
_INPUTS = ((types.UINT8, 1), (types.INT32, 1), (types.INT32, 1), (types.INT32, 0), (types.FLOAT, 0))


@dataclass(frozen=True)
class Form:
    """What distinguishes one pipeline from another.

    Args:
        batch_size: most images in a batch.
        resized: (height, width) to which windows are resized.
        size: (height, width) of the result, cut out of the middle.
        mean, std: of the channels, in [0, 1].
        jitter: whether brightness factors are applied.
        dtype: of the result.
        device_id: the GPU that decodes, None for the CPU.
    """

    batch_size: int
    resized: tuple[int, int]
    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    jitter: bool
    dtype: torch.dtype
    device_id: int | None


def build(form: Form, settings: ReadSettings, source: Callable[[], Any]) -> Pipeline:
    """Return a pipeline that yields one output: on a GPU n × H × W × 3, on the CPU the decoded windows, of any size.

    On the CPU the rest is done by `data.finishing`: DALI's resize and normalisation take more than half of a pipeline's time there.

    Args:
        form: what it does.
        settings: threads, prefetching and hints.
        source: called for every batch; returns, each as a batch, encoded bytes, window starts and sizes, whether to mirror, and with
            `form.jitter` brightness factors (on the CPU only the first three); raises StopIteration at the end of a pass.
    """
    mixed = form.device_id is not None
    pipeline = Pipeline(
        batch_size=form.batch_size,
        num_threads=max(settings.workers, 1),
        device_id=form.device_id,
        prefetch_queue_depth=max(settings.prefetch, 1),
        seed=0,
    )
    with pipeline:
        inputs = _INPUTS[: count_of(form.jitter, mixed)]
        encoded, start, shape, *more = fn.external_source(
            source=source, num_outputs=len(inputs), batch=True, dtype=[entry[0] for entry in inputs], ndim=[entry[1] for entry in inputs]
        )
        hints: dict[str, Any] = {}
        if mixed:
            hints = {
                "hw_decoder_load": settings.hardware_load,
                "preallocate_width_hint": settings.width_hint,
                "preallocate_height_hint": settings.height_hint,
            }
        images = fn.decoders.image_slice(
            encoded, start=start, shape=shape, axis_names="HW", device="mixed" if mixed else "cpu", output_type=types.RGB, **hints
        )
        pipeline.set_outputs(_finished(images, form, *more) if mixed else images)
    pipeline.build()
    return pipeline


def count_of(jitter: bool, mixed: bool) -> int:
    """Return how many inputs a pipeline takes."""
    return len(_INPUTS) - (not jitter) if mixed else len(_INPUTS) - 2


def _finished(images: Any, form: Form, mirror: Any, factor: Any = None) -> Any:
    images = fn.resize(images, size=list(form.resized), interp_type=types.INTERP_LINEAR, antialias=True)
    if factor is not None:
        images = dali_math.clamp(images * factor, 0.0, 255.0)
    plain = form.dtype == torch.uint8
    return fn.crop_mirror_normalize(
        images,
        crop=[float(side) for side in form.size],
        crop_pos_x=0.5,
        crop_pos_y=0.5,
        rounding="truncate",
        mirror=mirror,
        mean=[0.0] * 3 if plain else [255 * value for value in form.mean],
        std=[1.0] * 3 if plain else [255 * value for value in form.std],
        dtype=_TYPES[form.dtype],
        output_layout="HWC",
    )
