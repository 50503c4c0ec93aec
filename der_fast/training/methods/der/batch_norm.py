"""Batch-norm statistics of an extractor whose masks have become binary."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from der_fast.data.source import ImageSource
from der_fast.model.extractor import Extractor, MaskedBatchNorm
from der_fast.training.context import Context


@torch.no_grad()
def reestimate_batch_norm(
    context: Context, extractor: Extractor, masks: Tensor | None, source: ImageSource, generator: torch.Generator, *, batch_size: int = 128
) -> None:
    """Replace the running statistics by the mean over one pass of training images with the binary masks (docs/method.md).

    `masks.bn_images` images are drawn without replacement; 0 leaves the statistics alone.

    Args:
        context: settings and listeners.
        extractor: the full network; left in evaluation mode.
        masks: (C,) binary masks as floats.
        source: training images.
        generator: draws and augments them.
        batch_size: images per batch.
    """
    count = min(context.config.masks.bn_images, len(source))
    if count >= 2:
        told = partial(context.observer.images_pass, "batch-norm statistics")
        picked = torch.randperm(len(source), generator=generator)[:count]
        norms = [module for module in extractor.modules() if isinstance(module, MaskedBatchNorm)]
        usual = [norm.momentum for norm in norms]
        extractor.train()
        size, done = math.ceil(count / max(round(count / batch_size), 1)), 0
        for number, batch in enumerate(context.training_batches(source, picked, size, generator), 1):
            told(done, count)
            for norm in norms:
                norm.momentum = 1 / number
            extractor(batch.images, masks)
            done += len(batch.labels)
        for norm, momentum in zip(norms, usual, strict=True):
            norm.momentum = momentum
    extractor.eval()
