"""The methods, by the names that `method.name` and `--method` take.

A new one of ours is a file here, a line in `METHODS` and its name in `der_fast.config.check.METHODS`; one of yours calls `register`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from der_fast.config import check
from der_fast.config.schema import Config
from der_fast.errors import ConfigError
from der_fast.training.figures import RunFigures
from der_fast.training.method import Method
from der_fast.training.methods.bound import Bound
from der_fast.training.methods.der.method import Der
from der_fast.training.methods.replay import Replay
from der_fast.training.results import StepResult

METHODS: dict[str, Method[Any]] = {"der": Der(), "replay": Replay(), "bound": Bound()}


def register(name: str, method: Method[Any]) -> None:
    """Add a method of your own, so that `method.name` takes its name; raises ConfigError where that, or a figure's, is taken."""
    if name in METHODS:
        raise ConfigError(f"there is a method {name!r} already; give yours another name")
    if taken := sorted(method.figures.keys() & {each.name for each in (*fields(StepResult), *fields(RunFigures))}):
        raise ConfigError(f"the method {name!r} calls figures of its own {', '.join(taken)}, which every run has: give them other names")
    METHODS[name] = method
    check.METHODS.append(name)


def method_of(config: Config) -> Method[Any]:
    """Return the method that a configuration names; raises ConfigError where there is none of that name."""
    if config.method.name not in METHODS:
        raise ConfigError(f"method.name takes one of {', '.join(METHODS)}, not {config.method.name!r}")
    return METHODS[config.method.name]
