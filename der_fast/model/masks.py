"""The learnable channel masks of one extractor: a single flat parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from der_fast.kernels.channel_masks import channel_masks, masks_and_sparsity, sparsity_loss
from der_fast.model.layout import MaskLayout


class ChannelMasks(nn.Module):
    """Mask logits `e` of every group in one flat parameter (C,), float32.

    Args:
        layout: where each group lies.
        low, high: logits start uniformly in [low, high].
        clamp: bound of |e| after every optimizer step.
        generator: the source of the initial logits.
    """

    def __init__(self, layout: MaskLayout, *, low: float, high: float, clamp: float, generator: torch.Generator) -> None:
        super().__init__()
        self.layout = layout
        self.clamp = clamp
        start = torch.rand(layout.channels, generator=generator) * (high - low) + low
        self.logits = nn.Parameter(start.clamp(-clamp, clamp))
        self._structure = layout.structure()
        for name, value in self._structure.terms(torch.float32).items():
            self.register_buffer(f"_{name}", value, persistent=False)

    def forward(self, scale: Tensor | float) -> Tensor:
        """Return the masks m = σ(s·e), shape (C,), with the compensated gradient (eq. 5 and eq. 7)."""
        return channel_masks(self.logits, scale)

    def sparsity(self, masks: Tensor) -> Tensor:
        """Return the sparsity loss L_S of the masks (C,), a scalar in [0, 1] (eq. 8)."""
        names = ("membership", "reads", "writes", "image", "area")
        return sparsity_loss(masks, **{name: getattr(self, f"_{name}") for name in names})

    def with_sparsity(self, scale: Tensor | float, *, backend: str = "reference") -> tuple[Tensor, Tensor]:
        """Return the masks (C,) and their sparsity loss L_S together, with the compensated gradient.

        Args:
            scale: s; a tensor of one element on the logits' device is read when the masks are made, also in a replayed CUDA graph.
            backend: 'reference' gives what `forward` and `sparsity` give, bit for bit; 'fused' and 'native' take one launch each way.

        Raises:
            ValueError, BackendError: see `kernels.channel_masks.masks_and_sparsity`.
        """
        if self._structure.device != self.logits.device:
            self._structure = self._structure.to(self.logits.device)
        return masks_and_sparsity(self.logits, scale, self._structure, backend=backend)

    def keep(self) -> Tensor:
        """Return the binary masks, boolean (C,): channel c is kept iff e_c > 0 (eq. 12)."""
        return self.logits.detach() > 0

    @torch.no_grad()
    def clamp_logits(self) -> None:
        """Clamp the logits to ± `clamp`, as HAT does after each optimizer step."""
        self.logits.clamp_(-self.clamp, self.clamp)
