"""What every stage of a step needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from der_fast.config.schema import Config
from der_fast.data.augment.transform import Transform
from der_fast.data.read.place import BEGINNING, Place
from der_fast.data.source import Batch, ImageSource
from der_fast.kernels.backend import Backend
from der_fast.training.progress import Observer
from der_fast.training.state import StepState

REFERENCE = Backend("reference", "nothing else was asked for")


@dataclass(frozen=True)
class Context:
    """Settings, transforms and listeners of a run.

    Attributes:
        config: the resolved configuration.
        device: where the network runs.
        train_transform, test_transform: augmentation for training, and none for testing.
        observer: receives batches, epochs and steps.
        save: called with the state after every epoch and stage, and in the middle of long epochs.
        backend: which kernels train the new extractor.
    """

    config: Config
    device: torch.device
    train_transform: Transform
    test_transform: Transform
    observer: Observer = field(default_factory=Observer)
    save: Callable[[StepState], None] = lambda state: None
    backend: Backend = REFERENCE

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.runtime.seed

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that extractors compute in."""
        return torch.bfloat16 if self.config.runtime.precision == "bf16" else torch.float32

    def training_batches(
        self,
        source: ImageSource,
        chosen: Tensor | None,
        size: int,
        draws: torch.Generator,
        start: Place = BEGINNING,
        *,
        view: int | None = None,
    ) -> Iterator[Batch]:
        """Yield one epoch's batches of up to `size` augmented images, shuffled.

        Args:
            source: the images.
            chosen: positions (n,) of the images to use; default: all.
            size: images per batch.
            draws: shuffles and augments.
            start: where the pass begins.
            view: key of the augmentation; None: drawn for this epoch.
        """
        return source.batches(
            chosen,
            size,
            transform=self.view_of(view),
            generator=draws,
            shuffle=True,
            device=self.device,
            channels_last=self.config.runtime.channels_last,
            start=start,
        )

    def view_of(self, view: int | None) -> Transform:
        """Return the training transform; with a key, the one of that fixed view."""
        return self.train_transform if view is None else replace(self.train_transform, view=view)

    def view_batches(self, source: ImageSource, chosen: Tensor, view: int) -> Iterator[Batch]:
        """Yield batches of a fixed view, in the order of the positions `chosen` (n,), to compute features of."""
        return self._in_order(source, chosen, self.view_of(view))

    def test_batches(self, source: ImageSource, chosen: Tensor | None = None) -> Iterator[Batch]:
        """Yield batches of test-transformed images, in the order of the positions `chosen` (n,); default: all."""
        return self._in_order(source, chosen, self.test_transform)

    def _in_order(self, source: ImageSource, chosen: Tensor | None, transform: Transform) -> Iterator[Batch]:
        runtime = self.config.runtime
        return source.batches(chosen, runtime.eval_batch_size, transform=transform, device=self.device, channels_last=runtime.channels_last)

    def features(self, extractor: nn.Module, images: Tensor, *masks: Tensor | None) -> Tensor:
        """Return the features (N, F), float32, of an extractor or a bank in the run's precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            out: Tensor = extractor(images, *masks)
        return out.float()
