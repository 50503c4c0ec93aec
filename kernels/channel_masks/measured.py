"""Which of the two implementations of the channel masks is the faster one here: Triton's, or CUDA C++ where it was built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from der_fast import native
from der_fast.kernels.channel_masks import masks_and_sparsity
from der_fast.kernels.channel_masks.structure import MaskStructure
from der_fast.kernels.choices import Choices

REFERENCE, FUSED, NATIVE = "reference", "fused", "native"


def fastest_backend(logits: Tensor, scale: Tensor | float, structure: MaskStructure, choices: Choices) -> str:
    """Return the backend of `masks_and_sparsity` whose two launches, forward and backward, take the least time together.

    Both must agree with plain PyTorch, which is taken where neither works. 'native' is a candidate where the extension has code for the
    logits' device.

    Args:
        logits, scale, structure: as for `masks_and_sparsity`; nothing is changed.
        choices: remembers what was measured.
    """

    def one(backend: str) -> Callable[[], Sequence[Tensor]]:
        leaf = logits.detach().requires_grad_()
        arriving = torch.full_like(logits, 1.0 / len(logits)), torch.ones((), dtype=logits.dtype, device=logits.device)

        def run() -> Sequence[Tensor]:
            with torch.enable_grad():
                masks, loss = masks_and_sparsity(leaf, scale, structure, backend=backend)
                return masks.detach(), loss.detach(), *torch.autograd.grad((masks, loss), leaf, arriving)

        return run

    names = (REFERENCE, FUSED, NATIVE) if _has_native_code(logits.device) else (REFERENCE, FUSED)
    sizes = f"{structure.channels} channels|{len(structure.widths)} groups|{len(structure.convolutions)} convolutions"
    return choices.fastest(
        f"channel_masks|{str(logits.dtype).removeprefix('torch.')}|{sizes}",
        {name: one(name) for name in names},
        device=logits.device,
        usual=FUSED,
        what="channel masks run as",
        trusted=[REFERENCE],
        tensors=lambda result: cast(Sequence[Tensor], result),
        last_resort=REFERENCE,
    )


def _has_native_code(device: torch.device) -> bool:
    return native.available()[0] and (device.type == "cpu" or bool(native.build_info()["cuda"]))
