"""What Triton 3.9's compiler decides case by case: where registers spill, and where they leave room for one block only.

`python -m bench machine-code` says where this is no longer so.
"""

from __future__ import annotations

# Name → bytes of local memory per thread on each GPU.
SPILLS: dict[str, dict[int, int]] = {
    "conv.forward.bf16.128x128.chain": {80: 8},
    "conv.forward.bf16.148x148.chain": {80: 8},
    "conv.forward.bf16.64x128.stride2.chain": {80: 8},
    "conv.forward.fp32.40x40.chain": {80: 8},
}
# Name → GPUs on which one block fits where the launch code counts on two.
ALONE: dict[str, tuple[int, ...]] = {
    "conv.dgrad.bf16.37x37.chain": (90, 100),
    "conv.dgrad.bf16.40x40.join": (100,),
    "conv.dgrad.bf16.64x128.stride2.chain": (80,),
    "conv.dgrad.bf16.64x128.stride2.join": (80, 100),
    "conv.dgrad.bf16.64x64.chain": (100,),
    "conv.dgrad.bf16.64x64.join": (100,),
    "conv.dgrad.bf16.74x74.chain": (80,),
    "conv.dgrad.fp16.37x37.chain": (90, 100),
    "conv.dgrad.fp16.64x64.chain": (100,),
    "conv.forward.bf16.128x128.chain": (100,),
    "conv.forward.bf16.256x256.chain": (100,),
    "conv.forward.bf16.37x37.chain": (80, 90, 100),
    "conv.forward.bf16.512x512.chain": (100,),
    "conv.forward.bf16.64x128.stride2.chain": (100,),
    "conv.forward.bf16.74x74.chain": (80, 90, 100),
    "conv.forward.bf16.80x80.chain": (80, 100),
    "conv.forward.fp16.37x37.chain": (80, 90, 100),
    "conv.wgrad.bf16.148x148.chain": (80, 90),
    "conv.wgrad.bf16.152x152.chain": (80,),
    "conv.wgrad.bf16.24x24.chain": (80,),
    "conv.wgrad.bf16.256x256": (80,),
    "conv.wgrad.bf16.37x37": (80, 90, 100),
    "conv.wgrad.bf16.37x37.chain": (80, 90),
    "conv.wgrad.bf16.40x40.chain": (80,),
    "conv.wgrad.bf16.64x64.chain": (80,),
    "conv.wgrad.fp16.37x37.chain": (80, 90),
    "conv.wgrad.fp16.40x40.chain": (80,),
    "conv.wgrad.fp16.64x64.chain": (80,),
    "conv.wgrad.fp32.64x64.chain": (90, 100),
}
