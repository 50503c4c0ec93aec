"""Everything that changes while a step is learned, as one object that can be saved and read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from der_fast.errors import Spelling
from der_fast.kernels import choices
from der_fast.model.classifier import initialise_classifier
from der_fast.model.extractor import Extractor
from der_fast.training.position import Position
from der_fast.training.progress import EpochRecord

REPRESENTATION, CLASSIFIER = "representation", "classifier"
LEARNING_RATE = Spelling("--lr", "first.lr and later.lr in settings")
CLASSIFIER_RATE = Spelling("--set classifier.lr=…", 'settings={"classifier.lr": …}')
# A file that goes with a finished step: its tensors, and texts about them.
StepFile = tuple[dict[str, Tensor], dict[str, str]]


@dataclass
class StepState:
    """The current step. A method that keeps more derives its own state.

    Attributes:
        step: 1-based step.
        parts: the trained modules, by name. Linear layers may change their sizes during the step.
        stage: name of the current stage.
        stages: number of finished stages.
        epoch: number of finished epochs of the current stage.
        position: how far the current epoch got, in a state saved within an epoch; else None.
        momentum: SGD's momentum buffers by parameter name, if the current stage has any.
        records: this step's finished epochs.
        elapsed: seconds spent so far.
        notes: notes for the report.
        unreadable: image files that could not be read: path → reason. Once the step reads files, its source writes into it.
    """

    step: int
    parts: dict[str, nn.Module]
    stage: str = REPRESENTATION
    stages: int = 0
    epoch: int = 0
    position: Position | None = None
    momentum: dict[str, Tensor] = field(default_factory=dict)
    records: list[EpochRecord] = field(default_factory=list)
    elapsed: float = 0.0
    notes: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def extractor(self) -> Extractor:
        """The part of that name, in methods that have it."""
        return cast(Extractor, self.parts["extractor"])

    @extractor.setter
    def extractor(self, extractor: Extractor) -> None:
        self.parts["extractor"] = extractor

    @property
    def head(self) -> nn.Linear:
        """The part of that name: the classifier."""
        return cast(nn.Linear, self.parts["head"])

    @head.setter
    def head(self, head: nn.Linear) -> None:
        self.parts["head"] = head

    @property
    def spent(self) -> float:
        """Seconds spent so far, including those of the current epoch."""
        return self.elapsed + (self.position.seconds if self.position is not None else 0.0)

    @property
    def advice(self) -> tuple[str | Spelling, ...]:
        """What may help if the current stage diverges."""
        return (CLASSIFIER_RATE if self.stage == CLASSIFIER else LEARNING_RATE,)

    def enter(self, stage: str) -> None:
        """Begin the next stage."""
        self.stage, self.stages, self.epoch, self.position, self.momentum = stage, self.stages + 1, 0, None, {}

    def modules(self) -> dict[str, nn.Module]:
        """The parts with weights, by name."""
        return dict(self.parts)

    def redraw(self, name: str, draws: torch.Generator) -> None:
        """Initialise a part again, in place, if it is a linear layer."""
        layer = self.parts.get(name)
        if isinstance(layer, nn.Linear):
            initialise_classifier(layer, draws)

    def drop_gradients(self) -> None:
        """Free the gradients of parts that are no longer trained but stay until the step ends."""
        for module in self.parts.values():
            for parameter in module.parameters():
                parameter.grad = None

    def files(self) -> dict[str, StepFile]:
        """Files kept with a finished step for the report, by file name (of safetensors)."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, by name, as it lives: training goes on to write to it."""
        tensors = {f"{part}.{name}": value for part, module in self.modules().items() for name, value in module.state_dict().items()}
        tensors.update({f"momentum.{name}": value for name, value in self.momentum.items()})
        if self.position is not None:
            tensors["position.totals"] = self.position.totals
        return {name: value.detach() for name, value in tensors.items()}

    def facts(self) -> dict[str, Any]:
        """Everything else, as plain JSON values."""
        return {
            "step": self.step,
            "stage": self.stage,
            "stages": self.stages,
            "epoch": self.epoch,
            "position": None if self.position is None else self.position.facts(),
            "linear": {name: _sizes(part) for name, part in self.modules().items() if isinstance(part, nn.Linear)},
            "elapsed": self.elapsed,
            "records": [asdict(record) for record in self.records],
            "notes": list(self.notes),
            "unreadable": dict(self.unreadable),
            "strategies": choices.shared().record(),
        }

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Restore a saved state; raises KeyError or RuntimeError if it does not fit.

        The frozen extractors then run with the same strategy as before: a new measurement could choose another one.
        """
        device = next(parameter.device for part in self.parts.values() for parameter in part.parameters())
        for name, sizes in facts["linear"].items():
            self.parts[name] = _linear(sizes, device)
        for part, module in self.modules().items():
            module.load_state_dict(named_part(tensors, f"{part}."))
        self.momentum = moved(named_part(tensors, "momentum."), device)
        self.stage, self.stages, self.epoch = facts["stage"], facts["stages"], facts["epoch"]
        position = facts.get("position")
        self.position = None if position is None else Position.of(position, tensors["position.totals"])
        self.elapsed, self.notes = facts["elapsed"], list(facts["notes"])
        self.unreadable = dict(facts.get("unreadable", {}))
        self.records = [EpochRecord(**record) for record in facts["records"]]
        choices.shared().pin(facts["strategies"])


def named_part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix`, without it."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def moved(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the same tensors on a device."""
    return {name: value.to(device) for name, value in tensors.items()}


def _sizes(layer: nn.Linear) -> list[int]:
    return [layer.in_features, layer.out_features, int(layer.bias is not None)]


def _linear(sizes: Sequence[int], device: torch.device) -> nn.Linear:
    features, classes, bias = sizes
    return nn.Linear(features, classes, bias=bool(bias), device=device)
