"""TensorBoard event files of a run, written while it runs (extra ``tensorboard``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from der_fast.config.schema import Config
from der_fast.errors import BackendError
from der_fast.training.progress import EpochRecord, Observer


class TensorBoardObserver(Observer):
    """Writes one curve per stage and quantity, over the epochs of the whole run, and one point per step.

    Epochs are counted from the configuration, not from the events seen, so that a resumed run continues where it stopped.

    Args:
        folder: folder of the event files; created if it does not exist.

    Raises:
        BackendError: the package tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        self._writer = _summary_writer(Path(folder))
        self._config: Config | None = None

    def run_begins(self, steps: int, config: Config) -> None:
        self._config = config

    def step_begins(self, step: int, steps: int, class_names: Sequence[str], images: int) -> None:
        self._writer.add_text("step/classes", ", ".join(class_names), step)
        self._writer.add_scalar("step/images", images, step)

    def epoch_ends(self, record: EpochRecord) -> None:
        at = self._epochs_before(record) + record.epoch
        quantities = {
            "loss": record.loss,
            "accuracy": record.accuracy,
            "lr": record.lr,
            "images_per_s": record.images_per_s,
            "kept_share": record.kept_share,
            "sparsity_weight": record.sparsity_weight,
        }
        for name, value in quantities.items():
            if value is not None:
                self._writer.add_scalar(f"{record.stage}/{name}", value, at)
        self._writer.flush()

    def _epochs_before(self, record: EpochRecord) -> int:
        """Epochs of this stage in all steps before the record's."""
        earlier = record.step - 1
        if record.stage == "classifier":
            # The first step has no classifier stage.
            return record.epochs * (earlier - 1)
        if earlier == 0:
            return 0
        first = record.epochs if self._config is None else self._config.first.epochs
        return first + record.epochs * (earlier - 1)

    def step_ends(self, summary: dict[str, Any]) -> None:
        for name, value in summary.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(f"step/{name}", value, summary["step"])
        self._writer.flush()

    def message(self, text: str) -> None:
        self._writer.add_text("messages", text)

    def close(self) -> None:
        """Write what is still in memory and close the files."""
        self._writer.close()


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BackendError(
            f"runtime.tensorboard needs the package tensorboard, which cannot be imported ({error}); "
            "install it with: pip install 'der_fast[tensorboard]', or switch runtime.tensorboard off."
        ) from error
    factory: Any = SummaryWriter
    return factory(str(folder))
