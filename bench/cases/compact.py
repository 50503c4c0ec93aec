"""Cutting and packing a trained extractor whose weights are on the GPU: there, or on the CPU including the copies."""

from __future__ import annotations

import copy

import torch

from bench.harness.registry import Case, Run, Setting, Tensors, Variant, Work
from bench.subjects.networks import SharedNetworks
from der_fast.compaction import pack


def _case(setting: Setting, dtype: torch.dtype, align: int) -> Case:
    networks = SharedNetworks(setting)
    name = str(dtype).removeprefix("torch.")

    def inputs(generator: torch.Generator) -> Tensors:
        return {"nothing": torch.zeros(())}

    def packed(tensors: Tensors) -> Run:
        extractor = copy.deepcopy(networks.dense(0)).to(setting.device)
        return lambda: {"arena": pack(extractor, networks.plan(0), dtype=dtype, align=align).storage}

    def by_way_of_the_cpu(tensors: Tensors) -> Run:
        extractor = copy.deepcopy(networks.dense(0)).to(setting.device)

        def run() -> Tensors:
            arena = pack(copy.deepcopy(extractor).cpu(), networks.plan(0), dtype=dtype, align=align)
            return {"arena": arena.storage.to(setting.device)}

        return run

    def expected(tensors: Tensors) -> Tensors:
        return {"arena": pack(networks.dense(0), networks.plan(0), dtype=dtype, align=align).storage}

    def work(_: torch.dtype) -> Work:
        arena = pack(networks.dense(0), networks.plan(0), dtype=dtype, align=align)
        return Work(bytes=float(arena.nbytes + 4 * networks.plan(0).parameters))

    variants = (
        Variant("eager", torch.uint8, by_way_of_the_cpu, True, graphed=False, note="weights to the CPU, packed there, back"),
        Variant("ours", torch.uint8, packed, graphed=False, deterministic=True, note="on the device"),
    )
    return Case(
        "compact.pack",
        {"dtype": name, "align": align},
        inputs,
        expected,
        variants,
        work,
        timing="launch",
        cold=False,
        sets=1,
    )


def cases(setting: Setting) -> list[Case]:
    """Return the group."""
    return [_case(setting, torch.float32, 1), _case(setting, torch.bfloat16, 8)]
