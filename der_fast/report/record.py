"""The contents of a run folder, read tolerantly: absent parts are named, damaged ones are refused or left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from der_fast.config.datasets import own_name
from der_fast.config.protocols import planned_steps, shown
from der_fast.errors import RESUME, CheckpointError, Spelling
from der_fast.home import expand
from der_fast.report.fields import Fields, Values
from der_fast.report.trajectory import MaskTrajectory, read_trajectories
from der_fast.training.figures import RunFigures, StepFigures


@dataclass(frozen=True)
class EpochRow:
    """One line of history.json: `accuracy` in percent, `kept_share` in [0, 1], `None` if the run did not know."""

    step: int
    stage: str
    epoch: int
    epochs: float | None
    loss: float | None
    accuracy: float | None
    lr: float | None
    kept_share: float | None
    sparsity_weight: float | None
    settled: bool


@dataclass(frozen=True, kw_only=True)
class EventRow(StepFigures["float | None", "float | None"]):
    """A change of classes between the steps: `kind` 'refreshed', 'renamed' (class names: old, new) or 'forgotten', after `step` steps.

    The figures were measured afterwards and are None if nothing was; `images` is the number of new images.
    """

    kind: str
    step: int
    class_names: tuple[str, ...]
    images: float | None


@dataclass(frozen=True, kw_only=True)
class RunRecord(StepFigures[Values, Values], RunFigures):
    """A run, as far as it got.

    Lists indexed by step have one entry per *finished* step (T entries), `None` if the run has no value. Only pruned runs have
    `saved_seconds` and `kept`.
    """

    path: Path
    name: str
    protocol: str
    dataset: str
    steps: tuple[tuple[str, ...], ...]
    planned_steps: int
    saved_seconds: Values
    class_set_top1: tuple[Values, ...]
    confusion: tuple[tuple[int, ...], ...]
    kept: tuple[Mapping[str, tuple[int, int]], ...]
    backend: str
    device: str
    notes: tuple[str, ...]
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    history: tuple[EpochRow, ...]
    trajectories: tuple[MaskTrajectory, ...]
    missing: tuple[str, ...]
    events: tuple[EventRow, ...] = ()

    @property
    def unfinished(self) -> str | None:
        """One sentence about how far the unfinished step got; None if there is none."""
        return _how_far(self.history, len(self.top1))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Every class of the finished steps, in learning order."""
        return tuple(name for names in self.steps for name in names)

    @property
    def class_counts(self) -> tuple[int, ...]:
        """Number of classes seen after each finished step."""
        return tuple(sum(len(names) for names in self.steps[: step + 1]) for step in range(len(self.steps)))

    @property
    def data_share(self) -> float | None:
        """Percent of the training epochs' time that was spent waiting for images; None unless it is known for every step."""
        spent = [value for value in self.training_seconds if value is not None]
        waited = [value for value in self.data_seconds if value is not None]
        return 100 * sum(waited) / sum(spent) if len(spent) == len(waited) == len(self.seconds) and sum(spent) > 0 else None

    @property
    def title(self) -> str:
        """Data set (for a folder, its own name), protocol and the run's name."""
        return f"{own_name(self.dataset)} {shown(self.protocol)}, {self.name}"

    @property
    def backend_name(self) -> str:
        """The backend without the reason why it was chosen."""
        return self.backend.partition(" (")[0]

    @property
    def pruned(self) -> bool:
        """Whether the model is smaller than the unpruned one at any step."""
        pairs = zip(self.params, self.params_unpruned, strict=True)
        return any(count is not None and full is not None and count < full for count, full in pairs)


def read_run(run: str | Path) -> RunRecord:
    """Read RUN/metrics.json, RUN/history.json, RUN/config.json and RUN/steps/*/mask_logits.safetensors.

    Raises:
        CheckpointError: no such folder; metrics.json missing, not JSON, or without a usable `steps` or `top1`. A damaged
            history or mask file does not stop the report: `missing` names it, and also an unfinished step.
    """
    path = expand(run)
    metrics = _read_metrics(path)
    fields = Fields(metrics, path / "metrics.json")
    top1 = fields.values("top1")
    steps = fields.steps(len(top1))
    history = _read_history(path, fields.missing)
    unfinished = _how_far(history, len(top1))
    if unfinished is not None:
        fields.missing.append(f"{unfinished} Its accuracy and parameters will be known once it is.")
    kept = fields.kept(len(top1))
    config = fields.mapping("config") or _read_config(path)
    masks_off = config.get("masks", {}).get("enabled") is False if isinstance(config.get("masks"), dict) else False
    trajectories = read_trajectories(path, _settled_from(history), fields.missing)
    _name_missing_pictures(fields, kept, trajectories, masks_off)
    return RunRecord(
        path=path,
        name=fields.text("name", path.resolve().name),
        protocol=fields.text("protocol", "unknown protocol"),
        dataset=fields.text("dataset", "unknown data set"),
        steps=steps,
        planned_steps=max(planned_steps(fields.text("protocol", "")), fields.list_length("steps")),
        **fields.lists(StepFigures, len(top1)),
        **fields.numbers(RunFigures, average_top1=_mean(top1), last_top1=top1[-1]),
        saved_seconds=fields.per_step("saved_seconds", len(top1), needed=False),
        class_set_top1=fields.class_sets(len(top1)),
        confusion=fields.confusion(sum(map(len, steps))),
        kept=kept,
        backend=fields.text("backend", "unknown backend"),
        device=fields.text("device", "unknown device"),
        notes=fields.texts("notes"),
        config=config,
        versions={name: str(value) for name, value in fields.mapping("versions").items()},
        history=history,
        trajectories=trajectories,
        missing=tuple(fields.missing),
        events=tuple(_event_row(Fields(row, fields.file)) for row in fields.tables("events")),
    )


def _how_far(history: Sequence[EpochRow], finished: int) -> str | None:
    """Say how far the step after the `finished` ones got; None if none of its epochs is known."""
    if not history or history[-1].step <= finished:
        return None
    row = history[-1]
    of = "" if row.epochs is None else f" of {row.epochs:.0f}"
    figures = [
        *([] if row.loss is None else [f"loss {row.loss:.3f}"]),
        *([] if row.accuracy is None else [f"training accuracy {row.accuracy:.1f} %"]),
    ]
    shown = f" ({', '.join(figures)})" if figures else ""
    return f"Step {row.step} is not finished: its last finished epoch is {row.epoch}{of} of the {row.stage} stage{shown}."


def _settled_from(history: Sequence[EpochRow]) -> dict[int, int]:
    """Return the first epoch with binary masks of every step that has one."""
    settled: dict[int, int] = {}
    for row in history:
        if row.settled and row.stage == "representation":
            settled.setdefault(row.step, row.epoch)
    return settled


def _read_metrics(path: Path) -> Mapping[str, Any]:
    file = path / "metrics.json"
    if not path.is_dir():
        raise CheckpointError(
            f"there is no run folder {path}: give the folder that ", Spelling("`der-fast train --out`", "train(out=…)"), " wrote"
        )
    if not file.is_file():
        so_far = _how_far(_read_history(path, []), 0)
        raise CheckpointError(
            f"{path} holds no metrics.json, so there is nothing to report yet: it is written when the first step ends. "
            f"{'' if so_far is None else f'{so_far} '}Wait for the run or continue it (",
            RESUME,
            "), or give another folder.",
        )
    try:
        metrics = _strict_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read as JSON ({error}): it is damaged. Continue the run (", RESUME, ") to write it again."
        ) from error
    if not isinstance(metrics, dict):
        raise CheckpointError(f"{file} holds {type(metrics).__name__} instead of a table of metrics: it is damaged.")
    return metrics


def _strict_json(file: Path) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a JSON number")

    return json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = _strict_json(path / "config.json")
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _read_history(path: Path, missing: list[str]) -> tuple[EpochRow, ...]:
    file = path / "history.json"
    if not file.is_file():
        missing.append("Loss and kept share over epochs: the run has no history.json.")
        return ()
    try:
        rows = _strict_json(file)["epochs"]
        return tuple(_epoch_row(Fields(row, file)) for row in rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError) as error:
        missing.append(f"Loss and kept share over epochs: history.json is damaged ({error}).")
        return ()


def _epoch_row(fields: Fields) -> EpochRow:
    step, epoch = fields.number("step"), fields.number("epoch")
    if step is None or epoch is None:
        raise CheckpointError("an epoch without its step or number")
    return EpochRow(
        step=int(step),
        stage=fields.text("stage", "representation"),
        epoch=int(epoch),
        epochs=fields.number("epochs"),
        loss=fields.number("loss"),
        accuracy=fields.number("accuracy"),
        lr=fields.number("lr"),
        kept_share=fields.number("kept_share"),
        sparsity_weight=fields.number("sparsity_weight"),
        settled=fields.source.get("settled") is True,
    )


def _event_row(fields: Fields) -> EventRow:
    return EventRow(
        kind=fields.text("kind", "changed"),
        step=int(fields.number("step") or 0),
        class_names=fields.texts("class_names"),
        images=fields.number("images"),
        **fields.numbers(StepFigures),
    )


def _name_missing_pictures(
    fields: Fields, kept: tuple[Mapping[str, tuple[int, int]], ...], trajectories: tuple[MaskTrajectory, ...], masks_off: bool
) -> None:
    if not any(value is not None for value in fields.values("top1")):
        fields.missing.append("Accuracy: the run had no test images.")
    if masks_off:
        fields.missing.append("Kept channels and mask trajectories: the run was not pruned (masks.enabled = false).")
        return
    if not any(kept):
        fields.missing.append("Kept channels: metrics.json does not list the kept channels.")
    if not trajectories:
        fields.missing.append("Mask trajectories: the run has no readable steps/*/mask_logits.safetensors.")
    unknown = [str(masks.step) for masks in trajectories if masks.prices is None or masks.thresholds is None]
    if unknown:
        fields.missing.append(f"Prices and thresholds of the masks: the version that saved step {', '.join(unknown)} did not record them.")


def _mean(values: Values) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
