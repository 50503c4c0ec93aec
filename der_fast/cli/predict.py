"""`der-fast predict`: name the classes of image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from rich.table import Table

from der_fast.cli import options as opt
from der_fast.cli.console import output, print_json, say_note
from der_fast.cli.group import at_home
from der_fast.errors import ConfigError, DataError

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", callback=at_home, help="the folder of a saved run, or an exported .onnx or .safetensors file")
]
Paths = Annotated[
    list[Path], typer.Argument(metavar="PATH...", callback=at_home, help="image files, or folders (with everything below them)")
]
Top = Annotated[int, typer.Option(min=1, help="how many of the most probable classes to show")]


def predict(
    model: Model,
    paths: Paths,
    top: Top = 3,
    as_json: opt.Json = False,
    device: opt.Device = None,
    backend: opt.Backend = None,
    debug: opt.Debug = False,
) -> None:
    """Name the class of every image in PATH..., with probabilities; MODEL is a run or an exported file.

    Files that cannot be read, and those of other kinds, are reported on standard error; the exit code is 2 only if none could be read.
    """
    from der_fast.data.catalogue.found import find_images

    found = find_images(paths)
    files = found.files
    for note in found.notes:
        say_note(note)
    predictor = open_model(model, device, backend)
    rows: list[dict[str, Any]] = []
    for path, row in predictions(predictor, files, top):
        if row is None:
            say_note(path)
        else:
            rows.append({"path": path, **row})
    if as_json:
        print_json(rows)
    elif rows:
        output().print(predictions_table(rows))
    if not rows:
        raise DataError(f"none of the {len(files)} file(s) could be read as an image; see the notes above")


class Predictor(Protocol):
    """A learner or a deployed model."""

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels to which images are resized."""
        ...

    def predict(self, images: Any, *, top: int = 5) -> list[Any]:
        """Return a `Prediction` per image."""
        ...


def open_model(model: Path, device: str | None, backend: str | None) -> Predictor:
    """Open a run's folder, or an exported file.

    Raises:
        ConfigError: a backend was given, but an exported file has its own.
        UserError: it cannot be opened.
    """
    from der_fast.cli.display import OnlyMessages
    from der_fast.deployment import load
    from der_fast.training.learner import Learner

    if model.is_dir():
        return Learner.load(model, device=device, backend=backend, observer=OnlyMessages())
    if backend is not None and model.exists():
        raise ConfigError(f"--backend is for runs; {model} runs with its own: leave the option out")
    return load(model, device=device)


def predictions(model: Predictor, files: Sequence[Path], top: int) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield (path, prediction) for every file in order, then ("path: reason", None) for those that cannot be read, part by part."""
    from der_fast.data import file_parts

    assert model.image_size is not None
    for part, decoded in file_parts(files, model.image_size):
        for index, prediction in zip(decoded.kept, model.predict(decoded.images, top=top), strict=True):
            best = [{"class_name": name, "probability": probability} for name, probability in prediction.top]
            yield str(part[index]), {"class_name": prediction.class_name, "probability": prediction.probability, "top": best}
        for problem in decoded.problems:
            yield problem, None


def predictions_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return one row per image: path, class, probability, and the runners-up."""
    table = Table()
    table.add_column("image", overflow="fold")
    table.add_column("class")
    table.add_column("probability", justify="right")
    table.add_column("next")
    for row in rows:
        others = ", ".join(f"{entry['class_name']} {100 * entry['probability']:.1f} %" for entry in row["top"][1:])
        table.add_row(row["path"], row["class_name"], f"{100 * row['probability']:.1f} %", others)
    return table
