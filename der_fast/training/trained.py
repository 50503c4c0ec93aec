"""A trained model with its device and backend: it names the classes of images and measures itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from der_fast.config.schema import Config
from der_fast.data import MemorySource, image_parts, transforms_for
from der_fast.data.sets.dataset import as_source
from der_fast.data.source import ImageSource
from der_fast.errors import DerFastError
from der_fast.kernels.backend import Backend
from der_fast.kernels.forked import fit_to_compute
from der_fast.training.context import Context
from der_fast.training.evaluation import Evaluation, logits_of, score
from der_fast.training.measuring import measure
from der_fast.training.method import Method
from der_fast.training.methods import method_of
from der_fast.training.model import Model
from der_fast.training.prediction import Prediction, check_top, predictions_of
from der_fast.training.progress import Observer
from der_fast.training.results import StepResult
from der_fast.training.sources import check_test, without_empty_classes
from der_fast.training.state import StepState


class TrainedModel:
    """The part of a learner that uses the trained model.

    Attributes:
        config: the configuration.
        observer: receives progress.
        device, backend: where and how it runs.
        image_size: (height, width) in pixels of the learned images; None before the first step.
    """

    config: Config
    observer: Observer
    device: torch.device
    backend: Backend
    image_size: tuple[int, int] | None
    _model: Model | None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Every known class, in learning order."""
        return self._model.class_names if self._model else ()

    @property
    def method(self) -> Method[Any]:
        """The method that the configuration names."""
        return method_of(self.config)

    @property
    def model(self) -> Model:
        """The model so far; raises DerFastError before the first step."""
        if self._model is None:
            raise DerFastError("nothing has been learned yet: call learn() first")
        return self._model

    def predict(self, images: Any, *, top: int = 5) -> list[Prediction]:
        """Name the class of every image.

        Args:
            images: one image or many, in any form that `der_fast.data.image_parts` lists: paths, Pillow images, arrays and tensors, alone
                or in a list or generator. Many photos are decoded a part at a time, in several threads.
            top: how many of the best classes to return for each, at least 1.

        Returns:
            One prediction per image, in order.

        Raises:
            ConfigError: `top` below 1.
            DataError: images of another form, or a file that cannot be read.
        """
        top = check_top(top)
        fit_to_compute(self.device)
        model = self.model
        assert self.image_size is not None
        rows: list[Prediction] = []
        for pixels in image_parts(images, self.image_size):
            source = MemorySource(pixels, torch.zeros(len(pixels), dtype=torch.int64), model.class_names)
            logits, _ = logits_of(self._context(source), model.network.bank, model.ready, source)
            rows += predictions_of(model.ready.probabilities(logits), model.class_names, top)
        return rows

    def evaluate(self, test: Any) -> Evaluation:
        """Return the accuracy over all known classes on a test set; its classes must all be known.

        Raises:
            DataError: no images, images of another size than the learned ones, or a class that was never learned.
        """
        fit_to_compute(self.device)
        model = self.model
        assert self.image_size is not None
        source = without_empty_classes(as_source(test, self.config.data, self.image_size))
        check_test(source, model.class_names, self.image_size)
        return self._evaluate(self._context(source), model, source)

    def _context(self, source: ImageSource, save: Callable[[StepState], None] | None = None) -> Context:
        train_transform, test_transform = transforms_for(self.config.data, source.image_size)
        return Context(self.config, self.device, train_transform, test_transform, self.observer, save or (lambda state: None), self.backend)

    def _evaluate(self, context: Context, model: Model, test: ImageSource) -> Evaluation:
        named = test.relabelled(model.class_names)
        logits, read = logits_of(context, model.network.bank, model.ready, named)
        return score(logits, named.labels[read], model.class_names, model.class_sets)

    def _measured(self, context: Context | None, model: Model, test: Any, seconds: float) -> StepResult:
        source = None
        if test is not None:
            source = without_empty_classes(as_source(test, self.config.data, self.image_size))
            check_test(source, model.class_names, self.image_size or source.image_size)
        height, width = self.image_size or (0, 0)
        blank = MemorySource(torch.zeros(1, height, width, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ("",))
        context = context or self._context(blank)
        outcome = self._evaluate(context, model, source) if source is not None else None
        result = measure(context, model, None, outcome, None, seconds)
        return replace(result, class_names=())
