"""Every channel mask of a network at once: sigmoid, compensated gradient and sparsity loss."""

from der_fast.kernels.channel_masks.reference import channel_masks_reference as channel_masks
from der_fast.kernels.channel_masks.reference import sparsity_loss_reference as sparsity_loss

__all__ = ["channel_masks", "sparsity_loss"]
