"""The shapes of ResNet-18 with a small stem on 32 × 32 images, and tiny ones that only check that everything runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.harness.registry import Setting


@dataclass(frozen=True)
class ConvLayer:
    """A convolution: `inputs` → `outputs` channels, `side` × `side` pixels in, kernel, stride."""

    name: str
    inputs: int
    outputs: int
    side: int
    kernel: int = 3
    stride: int = 1

    @property
    def out_side(self) -> int:
        """The output's side."""
        return (self.side - 1) // self.stride + 1

    def flops(self, batch: int) -> float:
        """Multiplications and additions of one direction."""
        return 2.0 * batch * self.out_side**2 * self.outputs * self.inputs * self.kernel**2

    def bytes(self, batch: int, item: int) -> float:
        """Elements of input, output and weight together."""
        pixels = batch * (self.side**2 * self.inputs + self.out_side**2 * self.outputs)
        return float(item * (pixels + self.outputs * self.inputs * self.kernel**2))


STAGES = {1: (64, 32), 2: (128, 16), 3: (256, 8), 4: (512, 4)}
_LAYERS = (
    *(ConvLayer(f"stage{stage}", channels, channels, side) for stage, (channels, side) in STAGES.items()),
    ConvLayer("stem", 3, 64, 32),
    ConvLayer("down2", 64, 128, 32, stride=2),
    ConvLayer("short2", 64, 128, 32, kernel=1, stride=2),
)
_TINY = (ConvLayer("stage1", 8, 8, 6), ConvLayer("down2", 8, 16, 5, stride=2), ConvLayer("short2", 8, 16, 5, kernel=1, stride=2))


def layers(setting: Setting) -> tuple[ConvLayer, ...]:
    """Return the convolutions that are measured one by one."""
    if setting.smoke:
        return _TINY
    return _LAYERS if setting.scale == "full" else _LAYERS[:4]


def stages(setting: Setting) -> dict[int, tuple[int, int]]:
    """Return (channels, side) by stage."""
    return {1: (8, 6)} if setting.smoke else STAGES


def batches(setting: Setting) -> tuple[int, ...]:
    """Return the batch sizes."""
    return setting.pick((128, 512), (128,), (3,))


def short(dtype: torch.dtype) -> str:
    """Return the suffix of a variant's name."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
