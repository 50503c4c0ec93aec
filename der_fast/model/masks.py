"""The learnable channel masks of one extractor: a single flat parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from der_fast.kernels.channel_masks import masks_and_sparsity
from der_fast.kernels.channel_masks.measured import fastest_backend
from der_fast.kernels.choices import shared
from der_fast.model.layout import MaskLayout


class ChannelMasks(nn.Module):
    """Mask logits `e` of every group in one flat parameter (C,), float32.

    Args:
        layout: where each group lies.
        low, high: logits start uniformly in [low, high].
        clamp: bound of |e| after every optimizer step.
        generator: draws the initial logits.
    """

    def __init__(self, layout: MaskLayout, *, low: float, high: float, clamp: float, generator: torch.Generator) -> None:
        super().__init__()
        self.layout = layout
        self.clamp = clamp
        start = torch.rand(layout.channels, generator=generator) * (high - low) + low
        self.logits = nn.Parameter(start.clamp(-clamp, clamp))
        self._structure = layout.structure()
        # By device.
        self._fastest: dict[torch.device, str] = {}

    def with_sparsity(self, scale: Tensor | float, *, backend: str = "reference") -> tuple[Tensor, Tensor]:
        """Return the masks m = σ(s·e), (C,), and their sparsity loss L_S, with the compensated gradient (eq. 5, eq. 7 and eq. 8).

        Args:
            scale: s; a one-element tensor on the logits' device is read when the masks are computed, also in a replayed CUDA graph.
            backend: 'reference', or 'fused' and 'native', which need one launch per direction; 'auto': the faster of these two, measured
                at the first call on a device and remembered in the user's file.

        Raises:
            ValueError, BackendError: see `kernels.channel_masks.masks_and_sparsity`.
        """
        if self._structure.device != self.logits.device:
            self._structure = self._structure.to(self.logits.device)
        if backend == "auto":
            device = self.logits.device
            if device not in self._fastest:
                self._fastest[device] = fastest_backend(self.logits, scale, self._structure, shared())
            backend = self._fastest[device]
        return masks_and_sparsity(self.logits, scale, self._structure, backend=backend)

    def keep(self) -> Tensor:
        """Return the binary masks, boolean (C,): channel c is kept iff e_c > 0 (eq. 12)."""
        return self.logits.detach() > 0

    @torch.no_grad()
    def clamp_logits(self) -> None:
        """Clamp the logits to ± `clamp`, as HAT does after each optimizer step."""
        self.logits.clamp_(-self.clamp, self.clamp)
