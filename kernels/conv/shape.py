"""The shape of one convolution: 3×3 or 1×1, stride 1 or 2, padded so that stride 1 keeps height and width."""

from __future__ import annotations

from dataclasses import dataclass

KERNELS = (1, 3)
STRIDES = (1, 2)


@dataclass(frozen=True)
class ConvShape:
    """Sizes in elements.

    Attributes:
        batch, channels, height, width: of the input.
        filters: output channels.
        kernel: 1 or 3 (both height and width).
        stride: 1 or 2 (both directions).
    """

    batch: int
    channels: int
    height: int
    width: int
    filters: int
    kernel: int
    stride: int

    @property
    def out_height(self) -> int:
        """Height of the output, with a padding of kernel // 2."""
        return (self.height - 1) // self.stride + 1

    @property
    def out_width(self) -> int:
        """Width of the output."""
        return (self.width - 1) // self.stride + 1

    @property
    def in_rows(self) -> int:
        """N·H·W of the input."""
        return self.batch * self.height * self.width

    @property
    def out_rows(self) -> int:
        """N·H·W of the output."""
        return self.batch * self.out_height * self.out_width

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return self.kernel * self.kernel


def unit_of(channels: int) -> int:
    """Return the largest of 1, 2, 4, 8, 16 that divides `channels`.

    Triton only checks whether an argument is divisible by 16. Kernels take channels // unit and the unit as a constant, so rows of 8 or
    24 channels are still read 16 bytes at a time.
    """
    return min(channels & -channels, 16)
