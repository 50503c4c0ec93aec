"""What a step's result says of the network besides its accuracy: parameters, bytes, and the latency of it and of the unpruned network."""

from __future__ import annotations

import torch

from der_fast.compaction.bank import FrozenBank
from der_fast.compaction.program import folded_parameters
from der_fast.data.source import ImageSource
from der_fast.model.classifier import new_classifier
from der_fast.model.extractor import Extractor
from der_fast.model.layout import MaskLayout
from der_fast.seeds import generator
from der_fast.training.context import Context
from der_fast.training.evaluation import Evaluation
from der_fast.training.latency import latencies_ms, whole_model
from der_fast.training.results import StepResult
from der_fast.training.step import Model, Pruned


def measure(
    context: Context, model: Model, pruned: Pruned | None, outcome: Evaluation | None, reference: float | None, seconds: float
) -> StepResult:
    """Return the result of the model's last step, or of a change without a new extractor.

    Args:
        model: with its classifier.
        pruned: how the new extractor was pruned; None where there is no new one.
        outcome: accuracies; None where there are no test images.
        reference: top-1 accuracy in % of the reference model.
        seconds: what the step took.
    """
    assert model.head is not None
    layout, counts = MaskLayout(model.architecture), model.bank.parameter_counts()
    full, classes = model.architecture.parameters(), len(model.class_names)
    image = torch.zeros(1, 3, *context.test_transform.size, device=context.device)
    dense = Extractor(model.architecture).initialise(generator(0, "latency")).to(context.device).eval()
    if context.config.runtime.channels_last:
        dense.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # One extractor called as often as there are steps: as many different ones would need the memory of a model that nobody has.
    bank_unpruned = FrozenBank([dense] * len(model.bank))
    head_unpruned = new_classifier(bank_unpruned.features, classes, generator(0, "latency")).to(context.device)
    latency, added, unpruned, added_unpruned = latencies_ms(
        image,
        whole_model(model.bank, model.head),
        model.bank.extractors[-1],
        whole_model(bank_unpruned, head_unpruned),
        FrozenBank([dense]),
    )
    kept = None
    if pruned is not None and pruned.masked:
        kept = {name: [pruned.plan.widths[name], width] for name, width in layout.architecture.groups.items()}
    return StepResult(
        step=len(model.class_sets),
        class_names=model.class_sets[-1],
        top1=outcome.top1 if outcome else None,
        top5=outcome.top5 if outcome else None,
        class_set_top1=outcome.class_set_top1 if outcome else [None] * len(model.class_sets),
        confusion=outcome.confusion if outcome else None,
        params=sum(counts) + _numbers(model.head),
        params_unpruned=len(model.bank) * full + _numbers(head_unpruned),
        params_added=counts[-1] if pruned else 0,
        bytes=model.bank.nbytes + 4 * _numbers(model.head),
        bytes_unpruned=4 * (len(model.bank) * folded_parameters(model.architecture) + _numbers(head_unpruned)),
        kept=kept,
        kept_share=counts[-1] / full if pruned else 0.0,
        compaction_error=pruned.error if pruned else 0.0,
        latency_ms=latency.median,
        latency_added_ms=added.median if pruned else 0.0,
        latency_unpruned_ms=unpruned.median,
        latency_added_unpruned_ms=added_unpruned.median if pruned else None,
        latency_spread_ms=latency.spread,
        latency_added_spread_ms=added.spread if pruned else None,
        latency_added_unpruned_spread_ms=added_unpruned.spread if pruned else None,
        seconds=seconds,
        memory_per_class=_per_class(model.memory),
        saved_seconds=pruned.saved_seconds if pruned else None,
        reference_top1=reference,
    )


def _numbers(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _per_class(memory: ImageSource | None) -> int:
    return 0 if memory is None else int(torch.bincount(memory.labels).max())
