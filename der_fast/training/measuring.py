"""What a step's result holds besides accuracy: parameters, bytes, and the latency of the network and of the unpruned one."""

from __future__ import annotations

import torch

from der_fast.compaction.bank import FrozenBank
from der_fast.compaction.program import folded_parameters
from der_fast.data.source import ImageSource
from der_fast.model.extractor import Extractor
from der_fast.seeds import generator
from der_fast.training.context import Context
from der_fast.training.evaluation import Evaluation
from der_fast.training.latency import latencies_ms, whole_model
from der_fast.training.model import Model
from der_fast.training.packing import Packed
from der_fast.training.results import StepResult


def measure(
    context: Context, model: Model, packed: Packed | None, outcome: Evaluation | None, reference: float | None, seconds: float
) -> StepResult:
    """Return the result of the model's last step, or of a change without a new extractor.

    Args:
        model: with its readout.
        packed: the network with the new extractor; None if there is no new one.
        outcome: accuracies; None if there are no test images.
        reference: top-1 accuracy in % of the reference model.
        seconds: duration of the step.
    """
    network, readout = model.network, model.ready
    counts = network.bank.parameter_counts()
    full = network.architecture.parameters()
    image = torch.zeros(1, 3, *context.test_transform.size, device=context.device)
    dense = Extractor(network.architecture).initialise(generator(0, "latency")).to(context.device).eval()
    if context.config.runtime.channels_last:
        dense.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # One extractor, called once per step: different ones would need the memory of a model that nobody has.
    bank_unpruned = FrozenBank([dense] * len(network.bank))
    readout_unpruned = readout.blank(bank_unpruned.features)
    latency, added, unpruned, added_unpruned = latencies_ms(
        image,
        whole_model(network.bank, readout),
        network.bank.extractors[-1],
        whole_model(bank_unpruned, readout_unpruned),
        FrozenBank([dense]),
    )
    return StepResult(
        step=len(model.class_sets),
        class_names=model.class_sets[-1],
        top1=outcome.top1 if outcome else None,
        top5=outcome.top5 if outcome else None,
        class_set_top1=outcome.class_set_top1 if outcome else [None] * len(model.class_sets),
        confusion=outcome.confusion if outcome else None,
        params=sum(counts) + readout.parameters,
        params_unpruned=len(network.bank) * full + readout_unpruned.parameters,
        params_added=counts[-1] if packed else 0,
        bytes=network.bank.nbytes + 4 * readout.parameters,
        bytes_unpruned=4 * (len(network.bank) * folded_parameters(network.architecture) + readout_unpruned.parameters),
        kept=packed.newest.kept if packed else None,
        kept_share=counts[-1] / full if packed else 0.0,
        compaction_error=packed.newest.error if packed else 0.0,
        latency_ms=latency.median,
        latency_added_ms=added.median if packed else 0.0,
        latency_unpruned_ms=unpruned.median,
        latency_added_unpruned_ms=added_unpruned.median if packed else None,
        latency_spread_ms=latency.spread,
        latency_added_spread_ms=added.spread if packed else None,
        latency_added_unpruned_spread_ms=added_unpruned.spread if packed else None,
        seconds=seconds,
        memory_per_class=_per_class(model.memory),
        reference_top1=reference,
    )


def _per_class(memory: ImageSource | None) -> int:
    return 0 if memory is None else int(torch.bincount(memory.labels).max())
