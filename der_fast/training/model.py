"""What a learner keeps from step to step."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from der_fast.compaction.bank import FrozenBank
from der_fast.data.source import ImageSource
from der_fast.errors import DerFastError
from der_fast.model.architecture import Architecture
from der_fast.model.readout import Readout


@dataclass
class Network:
    """What was learned, and where the next step starts.

    Attributes:
        architecture: of every extractor.
        bank: the finished extractors.
        head: the trained classifier, which the next step extends; None before the first step.
        dense: weights of the newest extractor before compaction, where the next one starts.
    """

    architecture: Architecture
    bank: FrozenBank = field(default_factory=FrozenBank)
    head: nn.Linear | None = None
    dense: dict[str, Tensor] | None = None


@dataclass
class Model:
    """A network, how its classifier is used, and its rehearsal memory.

    Attributes:
        network: from images to features; the trained classifier.
        readout: from features to probabilities, at test time; None before the first step.
        memory: the rehearsal memory, labelled over all known classes, or None.
        class_sets: the class names of every step.
    """

    network: Network
    readout: Readout | None = None
    memory: ImageSource | None = None
    class_sets: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def class_names(self) -> tuple[str, ...]:
        """All known classes in learning order."""
        return tuple(name for names in self.class_sets for name in names)

    @property
    def ready(self) -> Readout:
        """The readout; raises DerFastError before the first step."""
        if self.readout is None:
            raise DerFastError("nothing has been learned yet: call learn() first")
        return self.readout
