"""The boxed convolutions that are compiled without a GPU, and what the code of each should be made of: all of it, on 9.0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from der_fast.kernels import compile_case as names
from der_fast.kernels.compile_case import CompileCase, typed
from der_fast.kernels.conv.boxes import CAPABILITY, box
from der_fast.kernels.conv.cases import SHAPES
from der_fast.kernels.conv.launch import ConvTiles, candidates
from der_fast.kernels.conv.shape import ConvShape

_CAPABILITIES = (10 * CAPABILITY[0] + CAPABILITY[1],)
# A 1×1 convolution of ResNet-50, and the last stage of a ResNet-18 where its tiles are too few: its sum is split.
_MORE = {"256x64.1x1": ConvShape(512, 256, 32, 32, 64, 1, 1), "512x512.batch128": replace(SHAPES["512x512"], batch=128)}
# All candidates of these are compiled, of the others the first.
_WHOLE = ("64x64", "512x512.batch128")
_WANTS: tuple[str, ...] = (names.TENSOR_CORES, names.NO_SCALAR_LOOP, names.WIDE_LOADS, names.WIDE_STORES, names.COPIES)
_WANTS += (names.ASKED_ASYNCHRONOUS, names.ASYNCHRONOUS)
_VECTORS = ("mean", "rstd", "scale", "shift")

Constants = Callable[[ConvShape, ConvTiles, bool, bool], dict[str, Any]]


def boxed_cases(kernel: Any, constants: Constants) -> list[CompileCase]:
    """Return launches of every shape that `boxes.applies` to, with sums and without.

    Args:
        kernel: the boxed kernel.
        constants: its compile-time arguments, of (shape as the kernel sees it, tiles, whether it is a dgrad, DOT_F32).
    """
    return list(_cases(kernel, constants))


def _cases(kernel: Any, constants: Constants) -> Iterator[CompileCase]:
    for size, shape in {**SHAPES, **_MORE}.items():
        for direction in ("forward", "dgrad"):
            boxed = [config for config in candidates(direction, shape, capability=CAPABILITY) if config.boxed]
            for number, config in enumerate(boxed):
                name = f"conv.descriptor.{direction}.bf16.{size}"
                if number == 0:
                    yield _case(kernel, name, direction, shape, config, "bf16", constants)
                elif size in _WHOLE:
                    tiles = f"{config.block_m}x{config.block_n}.stages{config.num_stages}.split{config.split}"
                    yield _case(kernel, f"{name}.{tiles}", direction, shape, config, "bf16", constants)
            if size in _WHOLE:
                yield _case(kernel, f"conv.descriptor.{direction}.fp16.{size}", direction, shape, boxed[0], "fp16", constants)
                yield _case(kernel, f"conv.descriptor.{direction}.bf16.{size}.plain", direction, shape, boxed[0], "bf16", constants)


def _case(kernel: Any, name: str, direction: str, shape: ConvShape, config: ConvTiles, dtype: str, constants: Constants) -> CompileCase:
    flip, sums = direction == "dgrad", config.split == 1 and not name.endswith(".plain")
    seen = replace(shape, channels=shape.filters, filters=shape.channels) if flip else shape
    size = box(seen, config.block_m)
    pointers = dict.fromkeys(((*_VECTORS, "partials") if flip else ("partials",)) if sums else (), "fp32")
    sizes = {"batch": seen.batch, "height": seen.height, "width": seen.width, "depth": seen.channels, "columns": seen.filters}
    launched = typed(kernel, pointers, dtype, sizes, constants(seen, config, flip, False))
    blocks: dict[str, tuple[str, list[int]]] = {
        "source": (dtype, [*size, config.block_k]),
        "weight": (dtype, [config.block_k, config.block_n] if flip else [config.block_n, config.block_k]),
        "out": ("fp32" if config.split > 1 else dtype, [*size, config.block_n]),
    }
    if flip and sums:
        blocks["y_in"] = (dtype, [*size, config.block_n])
    types = {name: f"tensordesc<{kind}[{','.join(map(str, block))}]>" for name, (kind, block) in blocks.items()}
    return CompileCase(
        name=name,
        kernel=kernel,
        signature={**launched["signature"], **types},
        constants={name: value for name, value in launched["constants"].items() if name not in types},
        aligned=launched["aligned"],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        capabilities=_CAPABILITIES,
        resident=config.resident,
        wants=_WANTS,
    )


def part_sums(kernel: Any, constants: Mapping[str, int]) -> list[CompileCase]:
    """Return the launches of the kernel that adds parts, with the sums that forward takes and with those that dgrad takes."""
    given = {"forward": ("partials",), "dgrad": (*_VECTORS, "partials")}
    sizes = {"rows": 2048, "columns": 512, "rows_of_part": 2048}
    tile = constants["BLOCK_M"] * constants["BLOCK_N"]
    found = []
    for direction, vectors in given.items():
        pointers = {"parts": "fp32", "out": "act", **dict.fromkeys(vectors, "fp32"), **({"y_in": "act"} if direction == "dgrad" else {})}
        found.append(
            CompileCase(
                name=f"conv.descriptor.{direction}.sum",
                kernel=kernel,
                **typed(kernel, pointers, "bf16", sizes, constants),
                num_warps=4,
                num_stages=1,
                capabilities=_CAPABILITIES,
                tile_loads=tile * 4,
                tile_stores=tile * 2,
                wants=(names.WIDE_LOADS, names.WIDE_STORES),
            )
        )
    return found
