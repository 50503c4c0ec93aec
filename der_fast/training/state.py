"""Everything that changes while one step is being learned, as one object that can be written down and read back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from der_fast.model.extractor import Extractor
from der_fast.model.masks import ChannelMasks
from der_fast.training.progress import EpochRecord

REPRESENTATION, CLASSIFIER = "representation", "classifier"


@dataclass
class StepState:
    """The step in progress.

    Attributes:
        step: 1-based step.
        extractor: the full network being trained.
        masks: its channel masks, or None.
        head: the classifier on the super-feature.
        auxiliary: the auxiliary classifier, or None.
        stage, epoch: stage in progress and its finished epochs.
        sparsity_weight: λ_s at the end of the last epoch.
        momentum: SGD's momentum buffers by parameter name, as far as the stage in progress has any.
        mask_log: the logits at the start and after every epoch.
        records: this step's finished epochs.
        elapsed: seconds spent so far.
        notes: what the report should mention.
    """

    step: int
    extractor: Extractor
    masks: ChannelMasks | None
    head: nn.Linear
    auxiliary: nn.Linear | None
    stage: str = REPRESENTATION
    epoch: int = 0
    sparsity_weight: float | None = None
    momentum: dict[str, Tensor] = field(default_factory=dict)
    mask_log: list[Tensor] = field(default_factory=list)
    records: list[EpochRecord] = field(default_factory=list)
    elapsed: float = 0.0
    notes: list[str] = field(default_factory=list)

    def modules(self) -> dict[str, nn.Module]:
        """The parts with weights, by name."""
        parts = {"extractor": self.extractor, "masks": self.masks, "head": self.head, "auxiliary": self.auxiliary}
        return {name: part for name, part in parts.items() if part is not None}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, by name, on the CPU and contiguous."""
        tensors = {f"{part}.{name}": value for part, module in self.modules().items() for name, value in module.state_dict().items()}
        tensors.update({f"momentum.{name}": value for name, value in self.momentum.items()})
        if self.mask_log:
            tensors["mask_log"] = torch.stack(self.mask_log)
        return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    def facts(self) -> dict[str, Any]:
        """Everything else, as plain JSON values."""
        return {
            "step": self.step,
            "stage": self.stage,
            "epoch": self.epoch,
            "sparsity_weight": self.sparsity_weight,
            "head": [self.head.in_features, self.head.out_features],
            "elapsed": self.elapsed,
            "records": [asdict(record) for record in self.records],
            "notes": list(self.notes),
        }

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take over a state that was written down; raises KeyError or RuntimeError where it does not fit."""
        features, classes = facts["head"]
        device = self.head.weight.device
        if features != self.head.in_features:
            self.head = nn.Linear(features, classes, device=device)
        for part, module in self.modules().items():
            own = {name.split(".", 1)[1]: value for name, value in tensors.items() if name.startswith(f"{part}.")}
            module.load_state_dict(own)
        self.momentum = {name.split(".", 1)[1]: value.to(device) for name, value in tensors.items() if name.startswith("momentum.")}
        self.mask_log = list(tensors["mask_log"]) if "mask_log" in tensors else []
        self.stage, self.epoch, self.sparsity_weight = facts["stage"], facts["epoch"], facts["sparsity_weight"]
        self.elapsed, self.notes = facts["elapsed"], list(facts["notes"])
        self.records = [EpochRecord(**record) for record in facts["records"]]
