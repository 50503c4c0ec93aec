"""der_fast: image classifiers that learn new classes in steps and hardly grow (DER, CVPR 2021, with its pruning)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from der_fast.api import RunResult, evaluate_run, forget_class, learn_run, rename_class, train
    from der_fast.config.schema import Config
    from der_fast.deployment import DeployedModel, Exported, export, load
    from der_fast.report import write_report
    from der_fast.training.learner import Learner
    from der_fast.training.prediction import Prediction

_HOMES = {
    "train": "der_fast.api",
    "learn_run": "der_fast.api",
    "evaluate_run": "der_fast.api",
    "rename_class": "der_fast.api",
    "forget_class": "der_fast.api",
    "RunResult": "der_fast.api",
    "Config": "der_fast.config.schema",
    "write_report": "der_fast.report",
    "Learner": "der_fast.training.learner",
    "Prediction": "der_fast.training.prediction",
    "DeployedModel": "der_fast.deployment",
    "Exported": "der_fast.deployment",
    "export": "der_fast.deployment",
    "load": "der_fast.deployment",
}

__all__ = [
    "Config",
    "DeployedModel",
    "Exported",
    "Learner",
    "Prediction",
    "RunResult",
    "evaluate_run",
    "export",
    "forget_class",
    "learn_run",
    "load",
    "rename_class",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    # Importing torch takes a second or two; --help and --version should not wait for it.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'der_fast' has no attribute {name!r}")
