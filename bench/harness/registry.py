"""What is measured: cases, each with the variants that it compares.

A case draws inputs and knows the exact result in float64 and the minimum of work. A variant is one implementation. All variants of a case
see the same inputs, drawn so that bfloat16 holds them exactly (`drawn`): any measured error is the variant's own, not that of rounding its
inputs.
"""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Run = Callable[[], Tensors]

# The groups of cases in the order in which they run: kernels first, whole steps last.
GROUPS = ("masked_bn", "channel_masks", "conv", "conv_chain", "bank", "augment", "compact", "step", "inference", "epoch")
OURS = "ours"
# Relative error in the 2-norm that is always accepted, whatever eager PyTorch's own error is.
FLOORS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.uint8: 0.0}


@dataclass(frozen=True)
class Setting:
    """Where cases run and how large they are.

    Attributes:
        device: where everything runs.
        scale: 'full'; 'quick': only the most informative cases; 'smoke': tiny shapes, to check that everything runs, never for a result.
        backend: of der_fast's variants, 'fused' or 'reference'.
        interpreted: "fused" runs in the interpreter, on the CPU; records say so.
    """

    device: torch.device
    scale: str = "full"
    backend: str = "reference"
    interpreted: bool = False

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def smoke(self) -> bool:
        """Whether shapes are tiny."""
        return self.scale == "smoke"

    def pick(self, full: tuple[int, ...], quick: tuple[int, ...], smoke: tuple[int, ...]) -> tuple[int, ...]:
        """Return the value for the current scale."""
        return {"full": full, "quick": quick, "smoke": smoke}[self.scale]


@dataclass(frozen=True)
class Work:
    """The minimum of work, for any implementation.

    Attributes:
        bytes: through device memory: each input read once, each output written once, plus what the method must read a second time.
        flops: multiplications and additions.
        images: processed by one run; for images/s.
    """

    bytes: float = 0.0
    flops: float = 0.0
    images: int = 0


def no_work(dtype: torch.dtype) -> Work:
    """For cases where only the time matters."""
    return Work()


@dataclass(frozen=True)
class Variant:
    """One implementation of a case.

    Attributes:
        name: 'eager', 'eager_fp16', 'compile', 'ours' ...
        dtype: of the activations.
        prepare: takes one set of inputs (as drawn) and returns what is timed; casts, copies and allocations of networks belong here.
        baseline: whether it sets the error allowed to others of its dtype (twice its own).
        graphed: whether the harness captures it in a CUDA graph if the case is timed that way; False if it makes its own graphs.
        deterministic: whether it must give the same bits every time.
        needs_cuda: whether it cannot run on the CPU.
        result: turns a run's outputs into what is compared with the expected ones (drops padding, joins parts); not timed.
        note: how it works, for the table.
    """

    name: str
    dtype: torch.dtype
    prepare: Callable[[Tensors], Run]
    baseline: bool = False
    graphed: bool = True
    deterministic: bool = False
    needs_cuda: bool = False
    result: Callable[[Tensors], Tensors] | None = None
    note: str = ""

    def shown(self, outputs: Tensors) -> Tensors:
        """Return what is compared with the expected outputs."""
        return outputs if self.result is None else self.result(outputs)


@dataclass(frozen=True)
class Case:
    """Something that several variants compute.

    Attributes:
        name: group and operation, e.g. 'masked_bn.forward'.
        params: what distinguishes cases of one name, in display order.
        inputs: draws one set, on the case's device, from a generator on it.
        expected: the outputs in float64, from inputs as drawn.
        variants: baselines first.
        work: by dtype of the activations.
        timing: 'graph': each run is replayed as a CUDA graph, as inside a captured training step; 'launch': called from Python, many in a
            row, launch overhead included; 'once': one run, wall time.
        cold: whether the L2 cache is flushed before every timed run.
        inner: runs per timed sample.
        batches: training steps in one run; times and work are per step.
        floors: by dtype, accepted relative errors that exceed FLOORS; the case says why.
        sanity: largest relative error of a baseline; above it the case itself is broken.
        sets: maximum number of input sets to rotate through.
    """

    name: str
    params: Mapping[str, object]
    inputs: Callable[[torch.Generator], Tensors]
    expected: Callable[[Tensors], Tensors]
    variants: tuple[Variant, ...]
    work: Callable[[torch.dtype], Work] = no_work
    timing: str = "graph"
    cold: bool = True
    inner: int = 1
    batches: int = 1
    floors: Mapping[torch.dtype, float] = field(default_factory=dict)
    sanity: float = 0.5
    sets: int = 4

    @property
    def id(self) -> str:
        """Name and parameters, e.g. 'masked_bn.forward[stage=1,batch=128]'."""
        inner = ",".join(f"{key}={value}" for key, value in self.params.items())
        return f"{self.name}[{inner}]"

    @property
    def group(self) -> str:
        """The part of the name before the dot."""
        return self.name.split(".")[0]


def cases_of(setting: Setting, groups: Iterable[str] = GROUPS) -> list[Case]:
    """Return every case of the groups; none is built yet.

    Raises:
        KeyError: an unknown group.
    """
    found: list[Case] = []
    for group in groups:
        if group not in GROUPS:
            raise KeyError(f"unknown group {group!r}: choose from {', '.join(GROUPS)}")
        module = importlib.import_module(f"bench.cases.{group}")
        found += module.cases(setting)
    return found


def chosen(cases: Iterable[Case], patterns: Iterable[str]) -> list[Case]:
    """Return the cases whose id or name matches one of the patterns (`*` for anything); all cases if there are no patterns."""
    wanted = list(patterns)
    return [case for case in cases if not wanted or any(_fits(case, pattern) for pattern in wanted)]


def _fits(case: Case, pattern: str) -> bool:
    # Brackets are part of an id, not a set of characters.
    literal = pattern.replace("[", "[[]")
    return any(fnmatch.fnmatchcase(text, literal) for text in (case.id, case.name, case.group))


def seeded(device: torch.device, seed: int) -> torch.Generator:
    """Return a generator on the device: drawing inputs there is faster than copying them."""
    return torch.Generator(device).manual_seed(seed)


def drawn(generator: torch.Generator, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Return normally distributed float32 numbers that bfloat16 holds exactly."""
    return (torch.randn(shape, generator=generator, device=generator.device) * scale + shift).bfloat16().float()


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Return float32 numbers in [0, 1) that bfloat16 holds exactly."""
    return torch.rand(shape, generator=generator, device=generator.device).mul(256).floor().div(256)


def image_like(tensor: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Move to the device, channels-last."""
    return tensor.to(device, dtype).contiguous(memory_format=torch.channels_last)
