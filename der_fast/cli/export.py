"""`der-fast export`: a saved run as one file that works without the run's folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from der_fast.cli import options as opt
from der_fast.cli.console import output, print_json, say_where
from der_fast.cli.group import at_home

Out = Annotated[
    Path,
    typer.Argument(
        metavar="OUT", callback=at_home, help="the file to write; its suffix sets the format: .onnx, .pt2 (torch.export) or .safetensors"
    ),
]
Raw = Annotated[
    bool, typer.Option("--raw-uint8", help=".onnx, .pt2: take uint8 images N × H × W × 3; crop and normalisation are part of the file")
]
Aoti = Annotated[bool, typer.Option("--aoti", help=".pt2: compile for this machine with AOTInductor; needs a C++ compiler")]
Check = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="PATH", callback=at_home, help="image to compare file and learner on, repeatable; default: the run's rehearsal memory"
    ),
]


def export(
    run: opt.Run,
    out: Out,
    raw_uint8: Raw = False,
    aoti: Aoti = False,
    check: Check = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Write the model of RUN to OUT, including class names and preprocessing, after comparing it with the learner on real images."""
    from der_fast.deployment import export

    done = export(run, out, raw_uint8=raw_uint8, aoti=aoti, images=check or None)
    if as_json:
        print_json({**asdict(done), "path": str(done.path)})
        return
    say_where("model", done.path)
    output().print(
        f"{len(done.class_names)} classes, {done.parameters:,} parameters, {done.nbytes / 1e6:.2f} MB; logits within {done.difference:.1e} "
        f"of the learner's on {done.images} real images",
        soft_wrap=True,
    )
