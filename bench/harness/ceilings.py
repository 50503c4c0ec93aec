"""The two ceilings, measured in the same run as the results: memory bandwidth with a large copy, arithmetic with a large product.

The data are random, since a product of zeros can run faster than any real one. Data sheets are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from bench.harness.registry import Case, Setting, Tensors, Work, seeded
from bench.harness.timing import Timing, capture, measure

_COPIED = {"full": 1 << 30, "quick": 1 << 30, "smoke": 1 << 20}
_SIDE = {"full": 8192, "quick": 8192, "smoke": 64}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Ceilings:
    """What this device achieves.

    Attributes:
        gb_per_s: of a copy, bytes read and bytes written.
        tflop_per_s: of a square matrix product, by dtype: 'bf16' and 'fp16'. There is none for float32, which cuDNN and cuBLAS round to
            TF32 in some cases and not in others.
    """

    gb_per_s: float
    tflop_per_s: Mapping[str, float]

    def as_dict(self) -> dict[str, object]:
        """Return the entry for a results file."""
        return asdict(self)


def dtype_name(dtype: torch.dtype) -> str:
    """Return 'bf16', 'fp16', 'fp32', 'fp64' or 'uint8'."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def _nothing(*_: object) -> Tensors:
    return {}


def _timed(run: object, setting: Setting, inner: int) -> Timing:
    case = Case("ceiling.none", {}, _nothing, _nothing, (), lambda dtype: Work(), cold=False, inner=inner)
    prepared = capture(run, inner) if setting.cuda else run  # type: ignore[arg-type]
    return measure([prepared], case, setting, "graph" if setting.cuda else "launch")  # type: ignore[list-item]


def measured(setting: Setting) -> Ceilings:
    """Measure both, on the current stream."""
    # Drawing 8192² numbers on the CPU takes longer than measuring.
    generator = seeded(setting.device, 0)
    return Ceilings(_copy_rate(setting, generator), _product_rates(setting, generator))


def _copy_rate(setting: Setting, generator: torch.Generator) -> float:
    size = _COPIED[setting.scale] // (1 if setting.cuda else 8)
    source = torch.randint(127, (1 << 20,), dtype=torch.uint8, generator=generator, device=setting.device).repeat(max(size >> 20, 1))
    target = torch.empty_like(source)
    copied = _timed(lambda: {"copy": target.copy_(source)}, setting, 4)
    return 2 * source.numel() / copied.median / 1e6


def _product_rates(setting: Setting, generator: torch.Generator) -> dict[str, float]:
    rates = {}
    side = _SIDE[setting.scale] // (1 if setting.cuda or setting.smoke else 8)
    for name, dtype in _DTYPES.items():
        left, right = (torch.randn(side, side, generator=generator, device=setting.device).to(dtype) for _ in range(2))
        product = _timed(lambda a=left, b=right: {"product": a @ b}, setting, 2)
        rates[name] = 2 * side**3 / product.median / 1e9
    return rates
