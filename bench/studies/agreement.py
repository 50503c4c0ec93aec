"""Do the fused and the reference backend train the same model? A short learner with each, on digits.

    python -m bench agreement --device cuda

They draw the same random numbers and differ only in rounding, so accuracies agree within the spread over seeds. The first epoch's loss
is compared more closely: 2 % in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.harness.arguments import study_parser
from der_fast.config.resolve import resolve_config
from der_fast.data import load_dataset
from der_fast.training.learner import Learner
from der_fast.training.progress import EpochRecord, Observer
from der_fast.training.protocol import class_order, split_steps

LOSS, ACCURACY = 0.02, 4.0


class Losses(Observer):
    """Keeps every epoch's loss."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def epoch_ends(self, record: EpochRecord) -> None:
        self.losses.append(record.loss)


def trained(backend: str, device: str, epochs: int, changes: Mapping[str, Any]) -> tuple[list[float], float]:
    """Return every epoch's loss and the average accuracy of a short run on digits."""
    keys: dict[str, Any] = {"runtime.backend": backend, "runtime.device": device, "runtime.precision": "bf16"}
    keys |= {"first.epochs": epochs, "first.milestones": (), "later.epochs": epochs, "later.milestones": ()}
    config = resolve_config("digits", None, changes={**keys, **changes})
    train, test = load_dataset(config.data)
    losses = Losses()
    learner = Learner(config, observer=losses)
    steps = split_steps(class_order(train.class_names, config.protocol), config.protocol.name)
    for number, names in enumerate(steps):
        learner.learn(train.of_classes(names), test.of_classes([name for part in steps[: number + 1] for name in part]))
    return losses.losses, float(learner.metrics()["average_top1"])


def complaints(reference: tuple[list[float], float], fused: tuple[list[float], float]) -> list[str]:
    """Return a message for everything that does not agree."""
    found = []
    one, other = reference[0][0], fused[0][0]
    if not abs(one - other) <= LOSS * abs(one):
        found.append(f"the first epoch's loss is {one:.4f} (reference) and {other:.4f} (fused): more than {100 * LOSS:.0f} % apart")
    if not abs(reference[1] - fused[1]) <= ACCURACY:
        found.append(
            f"average accuracy is {reference[1]:.2f} % (reference) and {fused[1]:.2f} % (fused): more than {ACCURACY} points apart"
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Train with both backends and compare; return 1 if they do not agree."""
    parser = study_parser("agreement", __doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args(arguments)
    found = {backend: trained(backend, args.device, args.epochs, {}) for backend in ("reference", "fused")}
    for backend, (losses, accuracy) in found.items():
        print(f"{backend}: losses {losses[0]:.4f} … {losses[-1]:.4f}, average accuracy {accuracy:.2f} %")
    wrong = complaints(found["reference"], found["fused"])
    print("\n".join(wrong) or "they agree")
    return int(bool(wrong))
