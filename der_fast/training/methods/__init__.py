"""The methods, by the names that `method.name` and `--method` accept.

A method of this package is a line in `der_fast.config.methods` and a file here, listed in `METHODS`. Your own method calls `register`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from der_fast.config import methods as declared
from der_fast.config.schema import Config
from der_fast.errors import ConfigError
from der_fast.training.figures import RunFigures
from der_fast.training.method import Method
from der_fast.training.methods.bound import Bound
from der_fast.training.methods.der.method import Der
from der_fast.training.methods.replay import Replay
from der_fast.training.results import StepResult

METHODS: dict[str, Method[Any]] = {"der": Der(), "replay": Replay(), "bound": Bound()}


def check_complete(methods: Mapping[str, Method[Any]]) -> None:
    """Refuse a method that is declared but missing here, or the other way round; raises RuntimeError with their names."""
    if differing := sorted(methods.keys() ^ declared.METHODS.keys()):
        raise RuntimeError(f"{', '.join(differing)}: der_fast.config.methods and der_fast.training.methods must have the same methods")


check_complete(METHODS)


def register(name: str, method: Method[Any], meaning: str = "") -> None:
    """Add a method of your own, so that `method.name` accepts its name; raises ConfigError if that name, or a figure's, is taken."""
    if name in METHODS:
        raise ConfigError(f"there is already a method {name!r}; give yours another name")
    if taken := sorted(method.figures.keys() & {each.name for each in (*fields(StepResult), *fields(RunFigures))}):
        raise ConfigError(f"the method {name!r} declares figures {', '.join(taken)}, but every run has figures of that name: rename them")
    METHODS[name] = method
    declared.METHODS[name] = meaning


def method_of(config: Config) -> Method[Any]:
    """Return the method that a configuration names; raises ConfigError if there is none with that name."""
    if config.method.name not in METHODS:
        raise ConfigError(f"method.name takes one of {', '.join(METHODS)}, not {config.method.name!r}")
    return METHODS[config.method.name]
