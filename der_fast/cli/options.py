"""The options that `der-fast` commands take, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from der_fast.cli.group import at_home, remember_debug
from der_fast.config.methods import METHODS
from der_fast.config.presets import list_presets
from der_fast.config.rules import ORDERS
from der_fast.config.schema import BACKBONES, BACKENDS

_LEARN = "What is learned"
_SCHEDULE = "Schedule"
_MEMORY = "Rehearsal memory"
_METHOD = "Pruning and ablations"
_RUN = "Where and how it runs"

Data = Annotated[
    str | None,
    typer.Argument(
        metavar="DATA",
        help="digits, cifar10, cifar100, a folder of class folders (with or without train/ and test/), or a .txt of 'path class'",
    ),
]
MovedData = Annotated[
    str | None, typer.Option("--data", help="where the images of the run's own data set are now, if they were moved", rich_help_panel=_RUN)
]
Run = Annotated[Path, typer.Argument(metavar="RUN", callback=at_home, help="the folder of a saved run")]

Protocol = Annotated[
    str | None,
    typer.Option(
        help="B0-n: all classes in n equal steps; B<base>-<n>: base classes, then n steps; 10,10,5: the sizes of all steps; or a text file "
        "with one step per line, its class names separated by commas",
        rich_help_panel=_LEARN,
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help=f"recipe to start from; default: the one made for DATA. One of {', '.join(list_presets())}; or a file of your own, FILE.toml "
        "(--print-config writes one)",
        rich_help_panel=_LEARN,
    ),
]
Backbone = Annotated[str | None, typer.Option(help=", ".join(BACKBONES), rich_help_panel=_LEARN)]
Width = Annotated[int | None, typer.Option(help="channels of the backbone's first stage", rich_help_panel=_LEARN)]
ClassOrder = Annotated[
    str | None,
    typer.Option(
        help=f"'alphabetical', {', '.join(ORDERS)}, class names separated by commas, or a file with one per line", rich_help_panel=_LEARN
    ),
]
Classes = Annotated[
    str | None,
    typer.Option(help="use only these classes: names separated by commas, or a file with one per line", rich_help_panel=_LEARN),
]
TrainPerClass = Annotated[
    int | None, typer.Option(help="use at most this many training images per class, the first by name", rich_help_panel=_LEARN)
]
TestPerClass = Annotated[int | None, typer.Option(help="use at most this many test images per class", rich_help_panel=_LEARN)]
DataRoot = Annotated[
    str | None, typer.Option(help="folder that holds cifar10 or cifar100: official archive, strips or images", rich_help_panel=_LEARN)
]
Download = Annotated[bool, typer.Option("--download", help="download a missing official archive", rich_help_panel=_LEARN)]

Epochs = Annotated[
    str | None,
    typer.Option(
        metavar="N[,M]",
        help="epochs of every step, or first,later; milestones and warm-up of the recipe move in proportion",
        rich_help_panel=_SCHEDULE,
    ),
]
LearnEpochs = Annotated[
    int | None, typer.Option(min=1, help="epochs of this step; milestones and warm-up of the run's recipe move in proportion")
]
BatchSize = Annotated[
    int | None,
    typer.Option(help="images per batch of the first and the later steps (not of the classifier stage)", rich_help_panel=_SCHEDULE),
]
LearningRate = Annotated[
    float | None,
    typer.Option("--lr", help="learning rate of the first and the later steps (not of the classifier stage)", rich_help_panel=_SCHEDULE),
]

Memory = Annotated[int | None, typer.Option(help="exemplars in total, shared by the seen classes", rich_help_panel=_MEMORY)]
MemoryPerClass = Annotated[int | None, typer.Option(help="exemplars per class, instead of --memory", rich_help_panel=_MEMORY)]

TargetParams = Annotated[
    float | None, typer.Option(help="share of an extractor's parameters to keep, e.g. 0.1; adapts the sparsity", rich_help_panel=_METHOD)
]
Paper = Annotated[
    bool,
    typer.Option(
        "--paper", help="as in the paper: no settling, no target, no floor, no whole blocks, no fixed views", rich_help_panel=_METHOD
    ),
]
Method = Annotated[
    str | None, typer.Option(help="; ".join(f"{name}: {meaning}" for name, meaning in METHODS.items()), rich_help_panel=_METHOD)
]
NoPrune = Annotated[bool, typer.Option("--no-prune", help="no channel masks: DER without pruning", rich_help_panel=_METHOD)]
NoAux = Annotated[bool, typer.Option("--no-aux", help="without the auxiliary loss", rich_help_panel=_METHOD)]
NoExpand = Annotated[bool, typer.Option("--no-expand", help="one extractor for all steps: --method replay", rich_help_panel=_METHOD)]
Bound = Annotated[bool, typer.Option("--bound", help="one extractor on all data: --method bound", rich_help_panel=_METHOD)]
Fwt = Annotated[bool, typer.Option("--fwt", help="also train the reference models that forward transfer needs", rich_help_panel=_METHOD)]

Out = Annotated[
    Path | None,
    typer.Option(help="folder of the run; default: a new one under runs/", rich_help_panel=_RUN, show_default=False, callback=at_home),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="continue the run in --out, or start it; DATA may then be left out", rich_help_panel=_RUN)
]
Seed = Annotated[int | None, typer.Option(help="seed of all random numbers except the class order", rich_help_panel=_RUN)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or auto", rich_help_panel=_RUN)]
Backend = Annotated[str | None, typer.Option(help=", ".join(BACKENDS), rich_help_panel=_RUN)]
Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="also write TensorBoard event files", rich_help_panel=_RUN)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="any configuration key; overrides everything else; repeatable", rich_help_panel=_RUN),
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="print the resolved configuration, as a file for --preset, and exit", rich_help_panel=_RUN)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="only the final table", rich_help_panel=_RUN)]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output instead of a table")]
Debug = Annotated[
    bool, typer.Option("--debug", help="also show the traceback of errors", callback=remember_debug, is_eager=True, rich_help_panel=_RUN)
]
