"""The report: pictures, tables and text of one run on a self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from der_fast.files import write_bytes
from der_fast.report import accuracy, channels, cost, reasons, style, tables, training
from der_fast.report.paper import PaperCurve, curve_beside, paper_curve
from der_fast.report.record import RunRecord, read_run
from der_fast.report.trajectory import MaskTrajectory

_MOST_TRAJECTORIES = 12


def write_report(run: str | Path) -> Path:
    """Write RUN/report.html, one self-contained page, and its pictures as RUN/figures/*.png.

    The page leaves out and names everything that the run lacks (masks, history, later steps, …).

    Args:
        run: the folder of a run, finished or not, with at least one finished step.

    Returns:
        The path of the page.

    Raises:
        CheckpointError: no such folder; metrics.json missing or damaged.
        StorageError: a file could not be written.
    """
    record = read_run(run)
    paper = curve_beside(record)
    pictures = draw_pictures(record, paper)
    trajectories, why = draw_trajectories(_evenly(record.trajectories)), draw_reasons(_evenly(record.trajectories))
    _write_figures(record.path / "figures", [*pictures.values(), *trajectories, *why])
    page = render(
        "report.html",
        run=record,
        paper=paper,
        pictures=pictures,
        trajectories=trajectories,
        trajectory_steps=len(record.trajectories),
        reasons=why,
        reason_table=reasons.table_of(record.trajectories),
        notes=(*record.notes, *_paper_note(record, paper)),
        tiles=tables.tiles(record),
        summary=tables.summary(record),
        step_table=tables.step_table(record),
        growth_table=tables.growth_table(record),
        class_table=tables.class_table(record),
        step_class_table=tables.step_class_table(record),
        event_table=tables.event_table(record),
        paper_table=tables.paper_table(record, paper) if paper is not None else None,
        config_table=tables.config_table(record.config),
        version_table=tables.version_table(record),
    )
    return write_bytes(record.path / "report.html", page)


def draw_pictures(run: RunRecord, paper: PaperCurve | None) -> dict[str, style.Picture]:
    """Draw everything except the mask trajectories; stem → picture, without those whose numbers the run lacks."""
    with style.look():
        drawn = (
            accuracy.accuracy_per_step(run, paper),
            accuracy.class_sets_over_time(run),
            accuracy.confusion_matrix(run),
            cost.parameters_per_step(run, paper),
            cost.latency_per_step(run),
            channels.kept_channels(run),
            training.epochs_of_the_run(run),
        )
    return {picture.stem: picture for picture in drawn if picture is not None}


def draw_trajectories(trajectories: Iterable[MaskTrajectory]) -> list[style.Picture]:
    """Draw one picture per step's mask logits."""
    with style.look():
        return [channels.mask_trajectories(masks) for masks in trajectories]


def draw_reasons(trajectories: Iterable[MaskTrajectory]) -> list[style.Picture]:
    """Draw one picture per step of why its channels stayed."""
    with style.look():
        return [reasons.picture_of(masks) for masks in trajectories]


def render(template: str, **values: Any) -> bytes:
    """Fill one of this package's templates; every value is escaped for HTML except a picture's data."""
    environment = Environment(
        loader=FunctionLoader(lambda name: files("der_fast.report").joinpath("templates", name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["data_uri"] = _data_uri
    # A class name may contain half a surrogate pair, which no encoding accepts.
    return environment.get_template(template).render(**values).encode("utf-8", "replace")


def _data_uri(picture: style.Picture) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"


def _evenly(trajectories: Sequence[MaskTrajectory]) -> list[MaskTrajectory]:
    """Choose at most `_MOST_TRAJECTORIES` steps, including the first and the last."""
    last = len(trajectories) - 1
    if last < _MOST_TRAJECTORIES:
        return list(trajectories)
    return [trajectories[round(index * last / (_MOST_TRAJECTORIES - 1))] for index in range(_MOST_TRAJECTORIES)]


def _write_figures(folder: Path, pictures: Sequence[style.Picture]) -> None:
    for picture in pictures:
        write_bytes(folder / f"{picture.stem}.png", picture.png)
    # Otherwise another choice of steps would leave pictures of an earlier report among the new ones.
    of_steps = {file for pattern in ("masks_step_*.png", "reasons_step_*.png") for file in folder.glob(pattern)}
    for stale in of_steps - {folder / f"{picture.stem}.png" for picture in pictures}:
        stale.unlink(missing_ok=True)


def _paper_note(run: RunRecord, paper: PaperCurve | None) -> tuple[str, ...]:
    if paper is None and paper_curve(run.dataset, run.protocol, run.class_counts) is not None:
        part = "this run used only part of the images per class (data.train_per_class, data.test_per_class)"
        return (f"The paper's curve is not drawn: {part}.",)
    return ()
