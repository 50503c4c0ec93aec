"""A step of DER in progress: the new extractor with its masks, the classifiers, and the remainder of the settled network."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from der_fast.compaction import plan
from der_fast.errors import Spelling
from der_fast.model.layout import MaskLayout
from der_fast.model.masks import ChannelMasks
from der_fast.training.methods.der.mask_log import FILE, MaskLog
from der_fast.training.methods.der.settled import PREFIX, Remainder, extractor_like, merged, narrowed, padding_of, widened
from der_fast.training.state import CLASSIFIER, StepFile, StepState, moved, named_part


@dataclass
class DerState(StepState):
    """See `StepState`; its parts are 'extractor', 'head' and, if there are any, 'masks' and 'auxiliary'.

    Attributes:
        remainder: the full network's part without the compact one; None while the full network is trained, and at the end of the stage.
        sparsity_weight: λ_s when the state was last saved.
        mask_log: the mask logits over time.
    """

    remainder: Remainder | None = None
    sparsity_weight: float | None = None
    mask_log: MaskLog = field(default_factory=MaskLog)

    @property
    def masks(self) -> ChannelMasks | None:
        """The channel masks, or None."""
        return cast("ChannelMasks | None", self.parts.get("masks"))

    @property
    def auxiliary(self) -> nn.Linear | None:
        """The auxiliary classifier, or None."""
        return cast("nn.Linear | None", self.parts.get("auxiliary"))

    @property
    def advice(self) -> tuple[str | Spelling, ...]:
        """What may help if the current stage diverges."""
        if self.stage == CLASSIFIER or self.masks is None:
            return super().advice
        # Deep networks do not survive a residual stream whose masks are all zero: after it everything is constant.
        return *super().advice, ", or masks.lr or masks.sparsity, or keep every residual stream alive with masks.floor=0.1"

    def compact(self, keep: Tensor) -> bool:
        """Continue with the compact network: extractor, classifiers and momentum lose the pruned channels.

        Args:
            keep: boolean (C,), the binary masks.

        Returns:
            False, without any change, if a residual stream kept nothing: no network is left to train.
        """
        decision = plan(MaskLayout(self.extractor.architecture), keep)
        if decision.constant:
            return False
        full = {name: value.detach() for name, value in self.extractor.state_dict().items()}
        self.remainder = Remainder(decision, full, named_part(self.momentum, PREFIX))
        self.parts, self.momentum = narrowed(self.parts, self.momentum, decision.selection)
        self._pad()
        return True

    def _pad(self) -> None:
        """Add dead channels to the compact network if it is trained with them."""
        assert self.remainder is not None
        self.remainder.padding = padding_of(self.remainder.plan, self.head.weight.device)
        if self.remainder.padding is not None:
            self.parts, self.momentum = widened(self.parts, self.momentum, self.remainder.padding)

    def alive(self) -> DerState:
        """Return this state without dead channels: itself if there are none, else one with copies of what is trained."""
        remainder = self.remainder
        if remainder is None or remainder.padding is None:
            return self
        parts, momentum = narrowed(self.parts, self.momentum, remainder.padding)
        return replace(self, parts=parts, momentum=momentum, remainder=replace(remainder, padding=None))

    def expand(self) -> None:
        """Return to the full network with the compact one's weights put back and without momentum; does nothing if it is full."""
        if self.remainder is None:
            return
        self.parts = self.alive().parts
        self.extractor, self.remainder, self.momentum = merged(self.extractor, self.remainder), None, {}

    def redraw(self, name: str, draws: torch.Generator) -> None:
        """See `StepState.redraw`; weights of dead features stay zero."""
        alive = self.alive()
        super(DerState, alive).redraw(name, draws)
        if alive is not self and name in self.parts:
            assert self.remainder is not None and self.remainder.padding is not None
            wide, _ = widened(alive.parts, {}, self.remainder.padding)
            # In place, because the optimizer holds the weights.
            self.parts[name].load_state_dict(wide[name].state_dict())

    def files(self) -> dict[str, StepFile]:
        """The mask trajectory, if there are masks, with the prices of the groups' channels."""
        if self.masks is None:
            return {}
        layout = self.masks.layout
        tensors = {**self.mask_log.tensors(), "offsets": torch.tensor(layout.offsets), "prices": layout.per_group(layout.prices())}
        return {FILE: (tensors, {"groups": json.dumps(list(layout.names))})}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, by name; see `StepState.tensors`. Dead channels are left out."""
        alive = self.alive()
        if alive is not self:
            return alive.tensors()
        tensors = {}
        if self.remainder is not None:
            tensors["keep"] = self.remainder.plan.keep
            tensors.update({f"full.{name}": value for name, value in self.remainder.tensors.items()})
            tensors.update({f"full_momentum.{name}": value for name, value in self.remainder.momentum.items()})
        tensors.update({f"mask_log.{name}": value for name, value in self.mask_log.tensors().items()})
        return {**super().tensors(), **{name: value.detach() for name, value in tensors.items()}}

    def facts(self) -> dict[str, Any]:
        """Everything else, as plain JSON values."""
        alive = self.alive()
        if alive is not self:
            return alive.facts()
        return {**super().facts(), "sparsity_weight": self.sparsity_weight}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Restore a saved state; raises KeyError or RuntimeError if it does not fit."""
        decision = plan(MaskLayout(self.extractor.architecture), tensors["keep"]) if "keep" in tensors else None
        self.extractor = extractor_like(self.extractor, decision.widths if decision else None)
        super().restore(tensors, facts)
        self.remainder = None
        if decision is not None:
            device = self.head.weight.device
            full, momentum = (moved(named_part(tensors, prefix), device) for prefix in ("full.", "full_momentum."))
            self.remainder = Remainder(decision, full, momentum)
            self._pad()
        self.mask_log = MaskLog.of(named_part(tensors, "mask_log."))
        self.sparsity_weight = facts["sparsity_weight"]
