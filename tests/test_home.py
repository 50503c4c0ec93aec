"""~ in every path that people give, the cache folder, and users who have neither home nor cache."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import platformdirs
import pytest
from PIL import Image
from typer.testing import CliRunner

import der_fast
from der_fast import api, home, runs
from der_fast.cli.main import app
from der_fast.cli.settings import changes_from
from der_fast.config.resolve import resolve_config
from der_fast.config.schema import Config, DataConfig
from der_fast.config.tree import declared, replace_keys
from der_fast.data import as_image_batch, load_dataset, load_folder_images
from der_fast.errors import CheckpointError, ConfigError, DataError, ExportError, UserError
from der_fast.home import cache_folder, expand, older_cache_folder
from der_fast.report import compare_runs, growth_table, write_report
from der_fast.training.learner import Learner


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    return tmp_path


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable names a home, and the system does not know the user."""
    for name in ("HOME", "USERPROFILE", "HOMEDRIVE", "HOMEPATH", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if os.name == "posix":
        import pwd

        def unknown(user: object) -> Any:
            raise KeyError(user)

        monkeypatch.setattr(pwd, "getpwuid", unknown)
        monkeypatch.setattr(pwd, "getpwnam", unknown)


def test_what_is_expanded(at_home: Path) -> None:
    assert expand("~") == at_home
    assert expand("~/a b/c") == expand(Path("~/a b/c")) == at_home / "a b" / "c"
    for path in ("plain", "./~", "a/~/b", "/abs/~", "", "~no-such-user-here/x", "~old photos"):
        assert expand(path) == Path(path)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_it_says_so() -> None:
    for path in ("~", "~/photos"):
        with pytest.raises(ConfigError, match=f"^{path}: this user has no home folder; write the path without ~, or set HOME$"):
            expand(path)
    assert expand("~old/photos") == Path("~old/photos")
    assert older_cache_folder() is None
    if sys.platform == "linux":
        assert cache_folder() is None


def test_the_cache_is_where_the_system_wants_it(at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(at_home / "elsewhere"))
    assert cache_folder() == Path(platformdirs.user_cache_dir("der_fast", appauthor=False))
    assert older_cache_folder() == at_home / ".cache" / "der_fast"
    if sys.platform == "linux":
        assert cache_folder() == at_home / "elsewhere" / "der_fast"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_folder() == at_home / ".cache" / "der_fast"


def test_an_older_platformdirs_leaves_what_it_cannot_expand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *names, **rest: "~/.cache/der_fast")
    assert cache_folder() is None


def path_parameters() -> Iterator[tuple[str, str, Any]]:
    """Command, name and declaration of every option and argument of the command line that is a path."""
    for info in app.registered_commands:
        assert info.callback is not None
        for name, hint in get_type_hints(info.callback, include_extras=True).items():
            if "pathlib" in str(hint):
                yield info.callback.__name__, name, hint.__metadata__[0]


def test_every_path_option_and_argument_knows_the_home_folder(at_home: Path) -> None:
    found = set()
    for command, name, parameter in path_parameters():
        assert parameter.callback is not None, f"{command}: {name} leaves ~ as it is; declare it with callback=at_home"
        assert parameter.callback([Path("~/a"), Path("b")]) == [at_home / "a", Path("b")]
        assert parameter.callback(Path("~/a")) == at_home / "a" and parameter.callback(None) is None
        found.add((command, name))
    assert {
        ("train", "out"),
        ("predict", "paths"),
        ("export", "check"),
        ("report", "runs"),
        ("learn", "folder"),
        ("evaluate", "run"),
    } <= found


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "~/x"], ["learn", "~/x", "y"], ["predict", ".", "~/x"], ["report", "~/x"], ["export", "~/x", "y.onnx"],
        ["export", "y", "~/x"], ["report", "r", "--compare", "~/x"], ["train", "--out", "~/x", "--resume"],
        ["train", "digits", "--out=~/x"],
        ["demo", "--out", "~/x"], ["train", "cifar10", "--data-root", "~/x", "--out", "r"], ["train", "~/x", "--out", "r"],
    ],
)  # fmt: skip
def test_the_command_line_knows_the_home_folder(arguments: list[str], at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = at_home / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    if arguments[-1].endswith("~/x") and {"--out", "--out=~/x"} & set(arguments):
        (at_home / "x").write_text("in the way of a run")
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 2, ended.output
    assert str(at_home / "x") in ended.stderr, ended.stderr


def test_every_text_option_that_may_be_a_path_knows_the_home_folder(at_home: Path) -> None:
    (at_home / "names.txt").write_text("b\na\n")
    changes = changes_from({"class_order": "~/names.txt", "classes": "~/names.txt", "data_root": "~/root"}, Config())
    assert changes["protocol.class_order"] == changes["data.classes"] == ("b", "a")
    assert resolve_config("digits", changes={"data.root": changes["data.root"]}).data.root == str(at_home / "root")


# Texts of the configuration that are no paths. A key that is neither here nor below makes the test fail.
NO_PATHS = {
    "method.name",
    "protocol.name",
    "protocol.class_order",
    "model.backbone",
    "model.stem",
    "data.reader",
    "runtime.device",
    "runtime.backend",
    "runtime.precision",
}


def test_every_path_of_the_configuration_knows_the_home_folder(at_home: Path) -> None:
    texts = {name for name, key in declared().items() if isinstance(key.default, str) or (key.default is None and accepts_text(name))}
    assert texts - NO_PATHS == {"data.name", "data.root", "data.test_list"}
    (at_home / "photos").mkdir()
    changes = {"data.name": "~/photos", "data.root": "~/root", "data.test_list": "~/test.txt"}
    data = resolve_config(changes=changes, preset="images").data
    assert (data.name, data.root, data.test_list) == tuple(str(at_home / name) for name in ("photos", "root", "test.txt"))


def accepts_text(key: str) -> bool:
    try:
        group, _, name = key.partition(".")
        return bool(getattr(getattr(replace_keys(Config(), {key: "~/x"}), group), name) == "~/x")
    except ConfigError:
        return False


# What the API is given under ~, and the error that names the home folder instead.
CALLS: dict[str, tuple[Callable[[], Any], type[UserError]]] = {
    "evaluate_run": (lambda: api.evaluate_run("~/x"), CheckpointError),
    "learn_run": (lambda: api.learn_run("~/x", "y"), CheckpointError),
    "write_report": (lambda: write_report("~/x"), CheckpointError),
    "growth_table": (lambda: growth_table("~/x"), CheckpointError),
    "compare_runs": (lambda: compare_runs(["~/x"], "y.png"), CheckpointError),
    "compare_runs to": (lambda: compare_runs(["a"], "~/x"), ConfigError),
    "load": (lambda: der_fast.load("~/x"), ExportError),
    "Learner.load": (lambda: Learner.load("~/x"), CheckpointError),
    "export": (lambda: der_fast.export("~/x", "y.onnx"), ExportError),
    "export to": (lambda: der_fast.export("y", "~/x"), ExportError),
    "as_image_batch": (lambda: as_image_batch(["~/x"], (8, 8)), DataError),
    "load_folder_images": (lambda: load_folder_images("~/x", (8, 8)), DataError),
    "load_dataset": (lambda: load_dataset(DataConfig(name="~/x")), DataError),
    "load_dataset of an archive": (lambda: load_dataset(DataConfig(name="cifar10", root="~/x")), DataError),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_api_knows_the_home_folder(name: str, at_home: Path) -> None:
    call, kind = CALLS[name]
    with pytest.raises(kind) as caught:
        call()
    assert str(at_home / "x") in str(caught.value) and "~/x" not in str(caught.value)


def test_training_reads_and_writes_at_home(at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, name in ((part, name) for part in ("train", "test") for name in "ab"):
        (at_home / "images" / part / name).mkdir(parents=True)
        for index in range(2):
            # No test image is one that is trained on.
            Image.new("RGB", (8, 8), (60 * index, 90 + 50 * (part == "test"), 100)).save(at_home / "images" / part / name / f"{index}.png")
    monkeypatch.setattr(runs, "write_report", lambda run: run)
    settings = {"first.epochs": 1, "first.milestones": (), "model.backbone": "resnet20", "model.width": 1, "masks.floor": 0.5}
    result = api.train("~/images", "B0-1", out="~/run", settings=settings)
    assert (result.out, result.metrics["dataset"]) == (at_home / "run", str(at_home / "images"))
    assert (at_home / "run" / "metrics.json").is_file()
    assert result.learner.save("~/copy") == at_home / "copy"
    assert api.evaluate_run("~/copy", "~/images").images == 4


# A user without a home, as containers have them: the password file knows the user no more than the environment does.
HOMELESS = """
import os, pwd, sys
for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
    os.environ.pop(name, None)
def unknown(user):
    raise KeyError(user)
pwd.getpwuid = unknown
from der_fast.cli.main import main
main()
"""
READ_ONLY = (
    "import os\nos.environ['HOME'] = '/proc/no/home'\nos.environ.pop('XDG_CACHE_HOME', None)\nfrom der_fast.cli.main import main\nmain()"
)
TINY = ["--train-per-class", "4", "--test-per-class", "2", "--width", "2", "--epochs", "1", "--memory", "40", "--batch-size", "8"]
TINY += ["--protocol", "B0-2", "--set", "masks.floor=0.5", "--set", "classifier.epochs=1", "--set", "runtime.threads=1", "--quiet"]


def called(code: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.skipif(sys.platform != "linux", reason="homes are looked up otherwise elsewhere")
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["doctor"], 0, "this user has no home folder; set HOME or XDG_CACHE_HOME"),
        (["train", "cifar10"], 2, "error: cifar10 needs the official archive cifar-10-python.tar.gz, and this user has no home folder"),
        (["train", "~/photos"], 2, "error: ~/photos: this user has no home folder; write the path without ~, or set HOME"),
        (["predict", "~", "x.png"], 2, "error: ~: this user has no home folder; write the path without ~, or set HOME"),
    ],
)
def test_a_user_without_a_home_gets_a_sentence(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    ended = called(HOMELESS, *arguments, folder=tmp_path)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert words in " ".join((ended.stdout + ended.stderr).split())


@pytest.mark.skipif(sys.platform != "linux", reason="homes are looked up otherwise elsewhere")
@pytest.mark.parametrize(
    ("code", "reason"), [(HOMELESS, "this user has no home folder"), (READ_ONLY, "cannot write /proc/no/home/.cache/der_fast/choices.json")]
)
def test_training_works_without_a_cache_and_one_line_says_so(code: str, reason: str, tmp_path: Path) -> None:
    ended = called(code, "train", "digits", *TINY, "--out", "run", folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    said = [line for line in ended.stderr.splitlines() if "is not kept, so the next run measures again" in line]
    assert len(said) == 1 and reason in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_nothing_else_expands_a_home_folder() -> None:
    """One function does it, so that one place says what happens without a home."""
    package = Path(home.__file__).parent
    files = [*package.rglob("*.py"), *Path(sys.modules["der_fast.kernels"].__file__ or "").parent.rglob("*.py")]
    words = ("expanduser", "Path.home", 'XDG_CACHE_HOME"', "user_cache_dir")
    found = {path.name for path in files if any(word in path.read_text(encoding="utf-8") for word in words)}
    assert found == {"home.py"}
