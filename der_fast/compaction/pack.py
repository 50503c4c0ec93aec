"""From a plan to the smaller network: the kept channels of every weight, batch-norm folded, in one piece of memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from der_fast import native
from der_fast.compaction.arena import ALIGNMENT, Arena, ArenaTensor
from der_fast.compaction.fold import lost_branches, lost_output, norm_of, scale_and_shift, sources
from der_fast.compaction.plan import CompactionPlan
from der_fast.compaction.units import AFFINE, CONSTANT, Unit, units
from der_fast.compaction.units import description as describe
from der_fast.errors import DivergenceError
from der_fast.kernels import compact as kernel
from der_fast.kernels.affine import EPSILON
from der_fast.kernels.dtypes import DTYPES, accumulator
from der_fast.model.architecture import Groups
from der_fast.model.extractor import Extractor


@torch.no_grad()
def pack(
    extractor: Extractor,
    plan: CompactionPlan | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "KRSC",
    align: int = 1,
    threads: int = 0,
) -> Arena:
    """Fold the kept part of an extractor into one arena, on the extractor's device.

    Args:
        extractor: the full network, or the compact one of the same plan; float32 or float64.
        plan: made by `plan` for the same architecture; None keeps everything that the extractor has.
        dtype: of the weights: float32, bfloat16, float16, or float64 (for comparisons in double precision). Biases, scales and
            shifts are float32 (float64 with float64).
        layout: 'KCRS' or 'KRSC' (channels last), of the weights in memory.
        align: kept channels of every group are padded with zeros to a multiple of this.
        threads: at most this many CPU threads; 0 for PyTorch's number.

    Raises:
        ValueError: the plan belongs to another network, an unknown dtype or layout, an alignment outside 1..1024, or a folded weight is too
            large for float16.
        DivergenceError: a kept weight or its batch-norm is NaN or infinite, or too large for float32 once folded; removed ones are not
            checked.
        BackendError: the native module is not built.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, not {dtype}")
    if layout not in kernel.LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(kernel.LAYOUTS)}, not {layout!r}")
    keep = _keep_of(extractor, plan)
    architecture = extractor.architecture
    codes = {"weight_dtype": native.dtype_code(dtype), "vector_dtype": native.dtype_code(accumulator(dtype))}
    found = native.plan(describe(architecture, extractor.widths), native.facts_of(keep), align=align, **codes)
    device = extractor.stem.weight.device
    place = device if device.type == "cpu" or native.build_info()["cuda"] else torch.device("cpu")
    entries, jobs = _jobs(extractor, plan, found, dtype, place)
    storage = _aligned(found["bytes"], place)
    bad = kernel.compact(jobs, storage, layout=layout, epsilon=EPSILON, threads=threads)
    if bad >= 0:
        _refuse(architecture.name, entries[bad], jobs[bad])
    names = tuple(architecture.groups)
    widths, stored = (dict(zip(names, found[key], strict=True)) for key in ("widths", "stored"))
    return Arena(architecture, widths, stored, align, dtype, layout, storage.to(device), entries)


def _keep_of(extractor: Extractor, plan: CompactionPlan | None) -> Tensor:
    """Return the masks over the channels that the extractor has."""
    everything = torch.ones(sum(extractor.widths.values()), dtype=torch.bool)
    if plan is None:
        return everything
    name = extractor.architecture.name
    if plan.layout.architecture != extractor.architecture:
        raise ValueError(f"the plan is for another network: {plan.layout.architecture.name}, not this {name}")
    if extractor.widths == dict(extractor.architecture.groups):
        return plan.masks
    if extractor.widths == plan.widths:
        return everything
    raise ValueError(f"the plan is for another compact {name}: its widths differ from the extractor's")


def _jobs(
    extractor: Extractor, plan: CompactionPlan | None, found: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> tuple[tuple[ArenaTensor, ...], list[kernel.Job]]:
    """Return the arena's entries, and the job that computes each."""
    rows, origins = units(extractor.architecture), sources(extractor)
    constants = _constants(extractor, plan, found)
    placed: dict[str, tuple[Tensor | None, kernel.Norm | None]] = {}
    entries, jobs = [], []
    for number, part, shape, offset in found["pieces"]:
        unit = rows[number]
        if unit.name not in placed:
            placed[unit.name] = _moved(constants[unit.name] if unit.kind == CONSTANT else origins[unit.name], device)
        weight, norm = placed[unit.name]
        is_weight = part == kernel.WEIGHT
        kind = dtype if is_weight else accumulator(dtype)
        entries.append(ArenaTensor(f"{unit.name}.{_suffix(unit, part)}", shape, offset, kind))
        columns = torch.from_numpy(found["columns"][number]) if is_weight else None
        source = weight if part in (kernel.WEIGHT, kernel.COPY) else None
        jobs.append(kernel.Job(part, offset, kind, torch.from_numpy(found["rows"][number]), columns, source, norm))
    return tuple(entries), jobs


def _suffix(unit: Unit, part: int) -> str:
    if part == kernel.WEIGHT:
        return "weight"
    if unit.kind == AFFINE:
        return "scale" if part == kernel.SCALE else "shift"
    return "bias"


def _moved(source: tuple[Tensor | None, kernel.Norm | None], device: torch.device) -> tuple[Tensor | None, kernel.Norm | None]:
    weight, norm = source
    if norm is not None and norm.weight.device != device:
        norm = kernel.Norm(*(tensor.to(device) for tensor in (norm.weight, norm.bias, norm.mean, norm.variance)))
    return None if weight is None else weight.to(device), norm


def _constants(extractor: Extractor, plan: CompactionPlan | None, found: dict[str, Any]) -> dict[str, tuple[Tensor, None]]:
    """Return, by unit, what lost branches leave behind: a constant after the last batch-norm, for every channel before compaction."""
    full = plan is not None and extractor.widths == dict(extractor.architecture.groups)

    def kept(groups: Groups) -> Tensor:
        if plan is not None and full:
            return plan.masked(groups)
        return torch.ones(extractor.architecture.width(groups, extractor.widths), dtype=torch.bool)

    if found["constant"] or extractor.architecture.preactivation:
        return {}
    constants: dict[str, tuple[Tensor, None]] = {}
    for block, module in lost_branches(extractor, kept):
        scale, shift = scale_and_shift(norm_of(module.norms[-1]))  # type: ignore[arg-type]
        constants[f"{block.name}.{block.convs[-1].name}"] = (lost_output(block, module, kept) * scale + shift, None)
    return constants


def _aligned(size: int, device: torch.device) -> Tensor:
    """Return an uninitialised uint8 vector that begins at a multiple of 64 bytes."""
    storage = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=device)
    begin = -storage.data_ptr() % ALIGNMENT
    return storage[begin : begin + size]


def _refuse(network: str, entry: ArenaTensor, job: kernel.Job) -> None:
    value = kernel.value_of(job, EPSILON)
    if entry.dtype == torch.float16 and bool(value.isfinite().all()):
        largest = float(value.abs().max())
        raise ValueError(f"{network}: {entry.name} holds {largest:.3g}, which {entry.dtype} cannot hold; choose bfloat16 or float32")
    raise DivergenceError(
        f"{network}: {entry.name} would hold NaN or infinity: the convolution's weights or its batch-norm are not finite, or far too "
        "large. Training has diverged"
    )
