"""`der-fast learn`: add the classes of a folder to a saved run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from der_fast.cli import options as opt
from der_fast.cli.folders import learned_config
from der_fast.cli.group import at_home, remember_resume
from der_fast.cli.running import run_and_show
from der_fast.cli.settings import changes_from
from der_fast.config.schema import Config
from der_fast.errors import DataError

Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", callback=at_home, help="class folders: images of new classes, or more of known ones")
]


def learn(
    ctx: typer.Context,
    run: opt.Run,
    folder: Folder,
    data: opt.MovedData = None,
    epochs: opt.LearnEpochs = None,
    batch_size: opt.BatchSize = None,
    lr: opt.LearningRate = None,
    memory: opt.Memory = None,
    memory_per_class: opt.MemoryPerClass = None,
    target_params: opt.TargetParams = None,
    device: opt.Device = None,
    backend: opt.Backend = None,
    settings: opt.Settings = None,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Learn the classes of FOLDER as one further step of the run in RUN; it keeps its earlier classes.

    If all of them are known already, no step is added: the rehearsal memory is chosen again from the old and new images, and the
    classifier is retrained.
    """
    overrides = learn_overrides(dict(ctx.params), learned_config(run))
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; give a folder with one folder of images per class")

    def work(observer: Any) -> None:
        from der_fast.api import learn_run

        learn_run(run, folder, data=data, overrides=overrides, observer=observer)

    remember_resume(ctx, lambda: f"{run} is as it was; the same command continues from where it stopped.")
    run_and_show(work, run, quiet=quiet)


def learn_overrides(options: dict[str, Any], base: Config) -> dict[str, Any]:
    """Return the dotted keys that this step changes; its schedule is the run's for later steps.

    Raises:
        ConfigError: a value that cannot be read.
    """
    return {name: value for name, value in changes_from(options, base).items() if not name.startswith("first.")}
