"""The methods, by the names that `method.name` and `--method` take. A new one: a file here and a line in `METHODS`."""

from __future__ import annotations

from typing import Any

from der_fast.config.schema import Config
from der_fast.errors import ConfigError
from der_fast.training.method import Method
from der_fast.training.methods.bound import Bound
from der_fast.training.methods.der.method import Der
from der_fast.training.methods.replay import Replay

METHODS: dict[str, Method[Any]] = {"der": Der(), "replay": Replay(), "bound": Bound()}


def method_of(config: Config) -> Method[Any]:
    """Return the method that a configuration names; raises ConfigError where there is none of that name."""
    if config.method.name not in METHODS:
        raise ConfigError(f"method.name takes one of {', '.join(METHODS)}, not {config.method.name!r}")
    return METHODS[config.method.name]
