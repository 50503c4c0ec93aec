"""`der-fast train`: a class-incremental run over a data set."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import typer

from der_fast.cli import options as opt
from der_fast.cli.console import print_recipe, say_note
from der_fast.cli.folders import begun_config, how_to_go_on, new_folder, usable_out
from der_fast.cli.group import remember_resume
from der_fast.cli.running import run_and_show
from der_fast.cli.settings import changes_from, refuse_contradictions
from der_fast.config.presets import load_preset
from der_fast.config.protocols import protocol_keys, shown
from der_fast.config.rescale import unreached_note
from der_fast.config.resolve import preset_for, resolve_config
from der_fast.config.run_folder import holds_run
from der_fast.config.schema import Config
from der_fast.errors import ConfigError


def train(
    ctx: typer.Context,
    data: opt.Data = None,
    protocol: opt.Protocol = None,
    preset: opt.Preset = None,
    backbone: opt.Backbone = None,
    width: opt.Width = None,
    class_order: opt.ClassOrder = None,
    classes: opt.Classes = None,
    train_per_class: opt.TrainPerClass = None,
    test_per_class: opt.TestPerClass = None,
    data_root: opt.DataRoot = None,
    download: opt.Download = False,
    epochs: opt.Epochs = None,
    batch_size: opt.BatchSize = None,
    lr: opt.LearningRate = None,
    memory: opt.Memory = None,
    memory_per_class: opt.MemoryPerClass = None,
    method: opt.Method = None,
    target_params: opt.TargetParams = None,
    paper: opt.Paper = False,
    no_prune: opt.NoPrune = False,
    no_aux: opt.NoAux = False,
    no_expand: opt.NoExpand = False,
    bound: opt.Bound = False,
    fwt: opt.Fwt = False,
    out: opt.Out = None,
    resume: opt.Resume = False,
    seed: opt.Seed = None,
    device: opt.Device = None,
    backend: opt.Backend = None,
    tensorboard: opt.Tensorboard = False,
    settings: opt.Settings = None,
    print_config: opt.PrintConfig = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Learn the classes of DATA step by step, prune after every step, and write the run to a folder.

    Starts from the recipe made for DATA (see --preset); options change it, --set changes any key.
    """
    config = resolve(dict(ctx.params))
    if print_config:
        print_recipe(config)
        if note := unreached_note(config):
            say_note(note)
        return
    if out is None:
        out = new_folder(ctx, Path("runs"), f"{Path(config.data.name).name}-{shown(config.protocol.name)}")
    usable_out(out, resume)
    say_note(f"writing to {out}")
    remember_resume(ctx, lambda: how_to_go_on(out))

    def work(observer: Any) -> None:
        from der_fast.runs import train_run

        train_run(config, out, resume=resume, observer=observer)

    run_and_show(work, out, quiet=quiet)


def resolve(options: dict[str, Any]) -> Config:
    """Turn the options of `der-fast train` into a checked configuration.

    With --resume the saved configuration is the base, so that DATA and options may be left out; those given still count, and
    training refuses what differs from the saved run. If no run was started yet, --resume changes nothing: a person who repeats a
    stopped command cannot know how far it got.

    Raises:
        ConfigError: neither DATA nor a run to resume, --resume without --out, or anything wrong with an option.
        CheckpointError: the run in --out is damaged.
    """
    refuse_contradictions(options)
    base, preset = None, options["preset"]
    nothing_named = options["data"] is None and (preset is None or "name" not in load_preset(preset).get("data", {}))
    if options["resume"]:
        if options["out"] is None:
            raise ConfigError("--resume needs --out, the folder of the run to continue")
        out = usable_out(options["out"], resume=True)
        base = begun_config(out) if holds_run(out) else None
        if base is None and nothing_named:
            raise ConfigError(f"there is no run to resume in {out}; check --out, or give DATA to start one there")
    elif nothing_named:
        raise ConfigError("DATA is missing: give digits, cifar10, cifar100 or a folder of class folders, e.g. `der-fast train digits`")
    if base is None and preset is None:
        protocol = options["protocol"]
        preset = preset_for(options["data"], None if protocol is None else protocol_keys(protocol)["protocol.name"])
        say_note(f"recipe: {f'preset {preset}' if preset else 'the defaults'}")
    put_together = partial(resolve_config, options["data"], options["protocol"], preset=preset, paper=options["paper"], base=base)
    config = put_together()
    if config.protocol.steps is not None and options["class_order"] is not None:
        raise ConfigError("--class-order does not apply to a protocol that names the classes of every step; leave it out")
    return put_together(changes=changes_from(options, config), begun=base)
