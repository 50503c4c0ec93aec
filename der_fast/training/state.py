"""Everything that changes while one step is being learned, as one object that can be written down and read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from der_fast.compaction import plan
from der_fast.kernels import choices
from der_fast.model.extractor import Extractor
from der_fast.model.layout import MaskLayout
from der_fast.model.masks import ChannelMasks
from der_fast.training.mask_log import MaskLog
from der_fast.training.position import Position
from der_fast.training.progress import EpochRecord
from der_fast.training.settled import Remainder, extractor_like, merged, slice_inputs, take_over

REPRESENTATION, CLASSIFIER = "representation", "classifier"


@dataclass
class StepState:
    """The step in progress.

    Attributes:
        step: 1-based step.
        extractor: the network being trained: the full one, or the compact one while `remainder` is set.
        masks: its channel masks, or None.
        head: the classifier on the super-feature.
        auxiliary: the auxiliary classifier, or None.
        remainder: what the compact network left behind of the full one; None while that is trained, and at the end of the stage.
        stage, epoch: stage in progress and its finished epochs.
        position: how far the epoch in progress went, in a state that was written down in its middle; else None.
        sparsity_weight: λ_s where the state was last written down.
        momentum: SGD's momentum buffers by parameter name, as far as the stage in progress has any.
        mask_log: how the mask logits went.
        records: this step's finished epochs.
        elapsed: seconds spent so far.
        notes: what the report should mention.
        unreadable: path → reason of image files that could not be read. Once the step reads files, its source writes into it.
    """

    step: int
    extractor: Extractor
    masks: ChannelMasks | None
    head: nn.Linear
    auxiliary: nn.Linear | None
    remainder: Remainder | None = None
    stage: str = REPRESENTATION
    epoch: int = 0
    position: Position | None = None
    sparsity_weight: float | None = None
    momentum: dict[str, Tensor] = field(default_factory=dict)
    mask_log: MaskLog = field(default_factory=MaskLog)
    records: list[EpochRecord] = field(default_factory=list)
    elapsed: float = 0.0
    notes: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def spent(self) -> float:
        """Seconds spent so far, with those of the epoch in progress."""
        return self.elapsed + (self.position.seconds if self.position is not None else 0.0)

    def modules(self) -> dict[str, nn.Module]:
        """The parts with weights, by name."""
        parts = {"extractor": self.extractor, "masks": self.masks, "head": self.head, "auxiliary": self.auxiliary}
        return {name: part for name, part in parts.items() if part is not None}

    def compact(self, keep: Tensor) -> bool:
        """Go on with the compact network: extractor, classifiers and momentum lose the pruned channels.

        Args:
            keep: boolean (C,), the binary masks.

        Returns:
            False, and nothing is changed, where a residual stream kept nothing: there is no network left to be trained.
        """
        decision = plan(MaskLayout(self.extractor.architecture), keep)
        if decision.constant:
            return False
        own = {part: named_part(self.momentum, f"{part}.") for part in self.modules()}
        old = torch.ones(self.head.in_features - self.extractor.features, dtype=torch.bool)
        self.extractor, own["extractor"], self.remainder = take_over(self.extractor, own["extractor"], decision)
        self.head, own["head"] = slice_inputs(self.head, own["head"], torch.cat([old, decision.features]))
        if self.auxiliary is not None:
            self.auxiliary, own["auxiliary"] = slice_inputs(self.auxiliary, own["auxiliary"], decision.features)
        self.momentum = {f"{part}.{name}": value for part, buffers in own.items() for name, value in buffers.items()}
        return True

    def expand(self) -> None:
        """Return to the full network, with the compact one's weights in their places; momentum is dropped. Else does nothing."""
        if self.remainder is None:
            return
        self.extractor, self.remainder, self.momentum = merged(self.extractor, self.remainder), None, {}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, by name, on the CPU and contiguous."""
        tensors = {f"{part}.{name}": value for part, module in self.modules().items() for name, value in module.state_dict().items()}
        tensors.update({f"momentum.{name}": value for name, value in self.momentum.items()})
        if self.remainder is not None:
            tensors["keep"] = self.remainder.plan.keep
            tensors.update({f"full.{name}": value for name, value in self.remainder.tensors.items()})
            tensors.update({f"full_momentum.{name}": value for name, value in self.remainder.momentum.items()})
        if self.position is not None:
            tensors["position.totals"] = self.position.totals
        tensors.update({f"mask_log.{name}": value for name, value in self.mask_log.tensors().items()})
        return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    def facts(self) -> dict[str, Any]:
        """Everything else, as plain JSON values."""
        return {
            "step": self.step,
            "stage": self.stage,
            "epoch": self.epoch,
            "position": None if self.position is None else self.position.facts(),
            "sparsity_weight": self.sparsity_weight,
            "head": [self.head.in_features, self.head.out_features],
            "auxiliary": None if self.auxiliary is None else [self.auxiliary.in_features, self.auxiliary.out_features],
            "elapsed": self.elapsed,
            "records": [asdict(record) for record in self.records],
            "notes": list(self.notes),
            "unreadable": dict(self.unreadable),
            "strategies": choices.shared().record(),
        }

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take over a state that was written down; raises KeyError or RuntimeError where it does not fit.

        The frozen extractors then run as they did before: how, is chosen by a measurement, which may end otherwise this time.
        """
        device = self.head.weight.device
        decision = plan(MaskLayout(self.extractor.architecture), tensors["keep"]) if "keep" in tensors else None
        self.extractor = extractor_like(self.extractor, decision.widths if decision else None)
        self.head = _linear(facts["head"], device)
        if self.auxiliary is not None:
            self.auxiliary = _linear(facts["auxiliary"], device)
        for part, module in self.modules().items():
            module.load_state_dict(named_part(tensors, f"{part}."))
        self.momentum = _moved(named_part(tensors, "momentum."), device)
        self.remainder = None
        if decision is not None:
            full, momentum = (named_part(tensors, prefix) for prefix in ("full.", "full_momentum."))
            self.remainder = Remainder(decision, _moved(full, device), _moved(momentum, device))
        self.mask_log = MaskLog.of(named_part(tensors, "mask_log."))
        self.stage, self.epoch, self.sparsity_weight = facts["stage"], facts["epoch"], facts["sparsity_weight"]
        position = facts.get("position")
        self.position = None if position is None else Position.of(position, tensors["position.totals"])
        self.elapsed, self.notes = facts["elapsed"], list(facts["notes"])
        self.unreadable = dict(facts.get("unreadable", {}))
        self.records = [EpochRecord(**record) for record in facts["records"]]
        choices.shared().pin(facts["strategies"])


def named_part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix`, without it."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _linear(sizes: Sequence[int], device: torch.device) -> nn.Linear:
    features, classes = sizes
    return nn.Linear(features, classes, device=device)


def _moved(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in tensors.items()}
