"""`der-fast train`, `demo` and `learn`: what they ask of the API, what they refuse, how they end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from der_fast.config.resolve import resolve_config
from der_fast.config.schema import Config
from der_fast.config.tree import parse_toml, replace_keys, to_dict
from der_fast.errors import DataError

Run = Callable[..., Result]


def save_config(run: Path, config: Config) -> None:
    run.mkdir(parents=True)
    for name in ("config.json", "metrics.json"):
        (run / name).write_text(json.dumps({"config": to_dict(config), "checksum": "abc"}))


def test_train_passes_the_resolved_configuration(run: Run, api: Any) -> None:
    ended = run("train", "cifar100", "--protocol", "B0-10", "--epochs", "17", "--no-aux", "--out", "c100", "--set", "later.lr=0.3")
    assert ended.exit_code == 0, ended.output
    (call,) = api.calls
    config = call["config"]
    assert (config.data.name, config.protocol.name, config.model.backbone) == ("cifar100", "B0-10", "resnet18")
    assert (config.first.milestones, config.later.lr, config.method.aux_weight) == ((11, 13), 0.3, 0.0)
    assert (call["out"], call["resume"]) == (Path("c100"), False)
    assert "preset cifar100-b0-10" in ended.stderr


def test_train_shows_table_and_places(run: Run, api: Any) -> None:
    ended = run("train", "digits", "--out", "d")
    assert "average incremental accuracy 85.25 %, last 80.50 %" in ended.stdout
    assert "1,800 parameters, 18.0 % of the 10,000 without pruning" in ended.stdout
    assert "report: d/report.html" in ended.stdout


def test_paper_switch(run: Run, api: Any) -> None:
    run("train", "digits", "--paper")
    assert api.calls[0]["config"].masks.settle == 0.0


def test_runs_get_folders_of_their_own(run: Run, api: Any) -> None:
    for _ in range(3):
        assert run("train", "digits", "--protocol", "B0-5").exit_code == 0
    assert run("demo").exit_code == 0
    assert run("demo").exit_code == 0
    expected = ["digits-b0-5", "digits-b0-5-2", "digits-b0-5-3", "demo", "demo-2"]
    assert [call["out"] for call in api.calls] == [Path("runs") / name for name in expected]


def test_folder_names_make_run_names(run: Run, api: Any, tmp_path: Path) -> None:
    run("train", tmp_path / "My Photos!", "--preset", "images")
    assert api.calls[0]["out"] == Path("runs/my-photos-b0-5")


def test_the_folder_is_named_before_work_starts(run: Run, api: Any) -> None:
    api.error = DataError("labels are out of range")
    assert "note: writing to runs/digits-b0-5\n" in run("train", "digits").stderr


def test_demo_is_the_digits_preset(run: Run, api: Any) -> None:
    assert run("demo", "--seed", "7", "--out", "here").exit_code == 0
    assert api.calls[0]["config"] == replace_keys(resolve_config(preset="digits"), {"runtime.seed": 7})
    assert api.calls[0]["out"] == Path("here")


@pytest.mark.parametrize("command", [["train", "digits"], ["demo"]])
def test_a_run_is_never_overwritten(run: Run, api: Any, command: list[str]) -> None:
    save_config(Path("old"), Config())
    ended = run(*command, "--out", "old")
    assert ended.exit_code == 2
    assert "old already holds a run; continue it with --resume, or give another --out" in ended.stderr
    assert api.calls == []


def test_out_that_is_a_file(run: Run, api: Any) -> None:
    Path("note.txt").write_text("x")
    assert "--out note.txt is a file; give a folder" in run("train", "digits", "--out", "note.txt").stderr


def test_resume_needs_no_data(run: Run, api: Any) -> None:
    saved = replace_keys(resolve_config("cifar100", "B0-10"), {"later.epochs": 12, "masks.settle": 0.25})
    save_config(Path("c"), saved)
    ended = run("train", "--out", "c", "--resume")
    assert ended.exit_code == 0, ended.output
    assert (api.calls[0]["config"], api.calls[0]["resume"]) == (saved, True)


@pytest.mark.parametrize("data", ["digits", "cifar100"])
@pytest.mark.parametrize("rate", ["0.05", "0.03", "0.013", "0.1"])
def test_resume_with_the_same_options_is_the_same_configuration(data: str, rate: str, run: Run, api: Any) -> None:
    command = ["train", data, "--protocol", "B0-10", "--epochs", "17", "--lr", rate, "--batch-size", "64", "--memory", "100", "--out", "c"]
    assert run(*command).exit_code == 0
    begun = api.calls[0]["config"]
    Path("c/config.json").write_text(json.dumps({"config": to_dict(begun)}))
    assert run(*command, "--resume").exit_code == 0
    assert api.calls[1]["config"] == begun


def test_resume_with_other_options_is_passed_on(run: Run, api: Any) -> None:
    # Training refuses it and names the keys.
    save_config(Path("c"), resolve_config("digits"))
    run("train", "--out", "c", "--resume", "--seed", "5")
    assert api.calls[0]["config"].runtime.seed == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], "DATA is missing: give digits, cifar10"),
        (["train", "--resume"], "--resume needs --out"),
        (["train", "--out", "nowhere", "--resume"], "there is no run to resume in nowhere"),
        (["train", "digits", "--epochs", "none"], "--epochs takes one whole number"),
        (["train", "digits", "--set", "lr=3"], "did you mean masks.lr, first.lr"),
        (["train", "digits", "--set", "later.lr"], "--set takes key=value"),
        (["train", "digits", "--backbone", "vgg"], "model.backbone takes one of resnet18"),
        (["train", "digits", "--device", "tpu"], "runtime.device takes cpu, cuda"),
        (["train", "digits", "--memory", "9", "--memory-per-class", "9"], "--memory and --memory-per-class do not go together"),
        (["train", "digits", "--preset", "cifar"], "unknown preset 'cifar'"),
        (["train", "digits", "--memory", "-1"], "memory.total takes a whole number of at least 0, not -1"),
        (["demo", "--epochs", "0"], "--epochs takes one whole number"),
        (["learn", "nowhere", "."], "there is no run folder nowhere"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_user_errors(run: Run, api: Any, arguments: list[str], words: str) -> None:
    ended = run(*arguments)
    assert ended.exit_code == 2
    assert ended.stderr.startswith("error: ") or "\nerror: " in ended.stderr
    assert words in ended.stderr
    assert "Traceback" not in ended.output
    assert api.calls == []


def test_errors_of_training_end_with_2(run: Run, api: Any) -> None:
    api.error = DataError("labels are out of range")
    ended = run("train", "digits")
    assert (ended.exit_code, "error: labels are out of range" in ended.stderr) == (2, True)
    assert "Traceback" not in ended.output


def test_debug_shows_the_traceback(run: Run, api: Any) -> None:
    api.error = DataError("labels are out of range")
    ended = run("train", "digits", "--debug")
    assert ended.exit_code == 2
    assert "Traceback" in ended.stderr
    assert "write_run" in ended.stderr


def test_faults_of_ours_are_not_hidden(run: Run, api: Any) -> None:
    api.error = ZeroDivisionError("ours")
    ended = run("train", "digits")
    assert ended.exit_code == 1
    assert isinstance(ended.exception, ZeroDivisionError)


def test_interruption(run: Run, api: Any) -> None:
    save_config(Path("my run"), resolve_config("digits"))
    api.error = KeyboardInterrupt()
    ended = run("train", "--out", "my run", "--resume")
    assert ended.exit_code == 130
    assert "continue with: der-fast train --out 'my run' --resume" in ended.stderr


def test_print_config(run: Run, api: Any) -> None:
    ended = run("train", "digits", "--epochs", "3", "--print-config")
    assert parse_toml(ended.stdout, "what was printed")["first"]["epochs"] == 3
    assert api.calls == []
    Path("mine.toml").write_text(ended.stdout)
    assert run("train", "--preset", "mine.toml").exit_code == 0
    assert api.calls[0]["config"] == resolve_config("digits", changes={"first.epochs": 3, "later.epochs": 3})


def test_the_options_join_what_a_recipe_of_ones_own_sets(run: Run, api: Any) -> None:
    Path("mine.toml").write_text('extends = "digits"\nmasks.floor = 0.1\n')
    assert run("train", "--preset", "mine.toml", "--lr", "0.02").exit_code == 0
    assert (api.calls[0]["config"].masks.floor, api.calls[0]["config"].later.lr) == (0.1, 0.02)
    ended = run("train", "--preset", "mine.toml", "--method", "replay")
    assert ended.exit_code == 2
    assert "masks.floor is a key of 'der', but method.name is 'replay'" in " ".join(ended.stderr.split())


def test_unreached_milestones_are_said(run: Run) -> None:
    ended = run("train", "digits", "--set", "later.milestones=5,30", "--print-config")
    assert "note: milestones that are never reached: later.milestones 30 of 20 epochs: the learning rate falls less often" in ended.stderr


@pytest.mark.parametrize("recipe", ["photos", "mine.toml"])
def test_a_recipe_without_data_needs_some(recipe: str, run: Run, api: Any) -> None:
    Path("mine.toml").write_text("[later]\nlr = 0.5\n")
    ended = run("train", "--preset", recipe)
    assert (ended.exit_code, api.calls) == (2, [])
    assert "DATA is missing" in ended.stderr


def test_an_older_run_is_gone_on_with_as_it_was_begun(run: Run, api: Any) -> None:
    # Earlier versions left the milestones where they were.
    old = replace_keys(resolve_config("cifar100", "B0-10"), {"later.epochs": 20, "later.warmup_epochs": 10})
    save_config(Path("c"), old)
    for options in ([], ["--preset", "cifar100-b0-10"]):
        assert (
            run("train", "cifar100", "--protocol", "B0-10", *options, "--set", "later.epochs=20", "--out", "c", "--resume").exit_code == 0
        )
    assert [call["config"].later for call in api.calls] == [old.later, old.later]


def test_quiet_shows_only_the_result(run: Run, api: Any) -> None:
    assert "1797" not in run("demo", "--quiet").stdout
    assert "1797" in run("demo").stdout


def test_learn_changes_the_later_schedule(run: Run, api: Any) -> None:
    save_config(Path("r"), resolve_config("cifar100", "B0-10"))
    Path("new").mkdir()
    ended = run("learn", "r", "new", "--epochs", "17", "--lr", "0.05", "--target-params", "0.2", "--device", "cpu")
    assert ended.exit_code == 0, ended.output
    (call,) = api.calls
    assert (call["out"], call["folder"]) == (Path("r"), Path("new"))
    assert call["overrides"] == {
        "later.epochs": 17,
        "later.lr": 0.05,
        "later.warmup_lr": pytest.approx(0.005),
        "masks.target_params": 0.2,
        "runtime.device": "cpu",
    }


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        (["--memory", "500"], {"memory.total": 500, "memory.per_class": None}),
        (["--memory", "0"], {"memory.total": 0, "memory.per_class": None}),
        (["--memory-per-class", "7"], {"memory.per_class": 7}),
    ],
)
def test_learn_changes_the_memory(options: list[str], keys: dict[str, Any], run: Run, api: Any) -> None:
    save_config(Path("r"), resolve_config("cifar100", "B50-5"))
    Path("new").mkdir()
    assert run("learn", "r", "new", *options).exit_code == 0
    assert api.calls[0]["overrides"] == keys


def test_learn_takes_one_kind_of_memory(run: Run, api: Any) -> None:
    save_config(Path("r"), Config())
    ended = run("learn", "r", ".", "--memory", "5", "--memory-per-class", "7")
    assert (ended.exit_code, api.calls) == (2, [])
    assert "--memory and --memory-per-class do not go together" in ended.stderr


def test_learn_refuses_a_missing_folder_and_a_damaged_run(run: Run, api: Any) -> None:
    save_config(Path("r"), Config())
    assert "there is no folder nowhere" in run("learn", "r", "nowhere").stderr
    Path("r/metrics.json").write_text("{")
    assert "cannot read r/metrics.json" in run("learn", "r", ".").stderr
    Path("r/metrics.json").write_text("[]")
    assert "r/metrics.json is damaged" in run("learn", "r", ".").stderr
    Path("r/metrics.json").write_text("{}")
    assert "r/metrics.json is damaged: it holds no configuration" in run("learn", "r", ".").stderr
    assert api.calls == []
