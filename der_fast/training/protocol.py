"""How classes are dealt out over steps: 'B0-10', 'B50-5', any base, any data set (docs/method.md: classes in steps)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from der_fast.config.check import refuse_repeats
from der_fast.config.schema import ProtocolConfig
from der_fast.data.names import spelled
from der_fast.errors import ConfigError
from der_fast.seeds import generator


def class_order(names: Sequence[str], config: ProtocolConfig) -> tuple[str, ...]:
    """Return the class names in the order in which they arrive.

    Args:
        names: all classes of the data set.
        config: an explicit `class_order`, or the seed of the shuffle; without either the data set's own order.

    Raises:
        ConfigError: the explicit order repeats a class or names one that the data set does not have.
    """
    if config.class_order is not None:
        order = tuple(map(spelled, config.class_order))
        refuse_repeats(order)
        called = {spelled(name): name for name in names}
        unknown = [name for name in order if name not in called]
        if unknown:
            raise ConfigError(
                f"protocol.class_order names {', '.join(unknown[:5])}, which the data set does not have; its classes: {_some(names)}"
            )
        return tuple(called[name] for name in order)
    if config.class_order_seed is None:
        return tuple(names)
    shuffled = torch.randperm(len(names), generator=generator(config.class_order_seed, "class order"))
    return tuple(names[int(i)] for i in shuffled)


def split_steps(order: Sequence[str], protocol: str) -> list[tuple[str, ...]]:
    """Deal the classes out over steps.

    Args:
        order: classes in the order in which they arrive.
        protocol: 'B0-n' (n equal steps) or 'B<base>-<n>' (base classes first, the rest in n equal steps).

    Raises:
        ConfigError: the text is no protocol, or the classes cannot be divided that way; the message names what would fit.
    """
    match = re.fullmatch(r"[Bb](\d+)-(\d+)", protocol.strip())
    if not match:
        raise ConfigError(f"protocol {protocol!r} is not of the form B0-<steps> or B<base>-<steps>, e.g. B0-10 or B50-5")
    base, steps = int(match[1]), int(match[2])
    rest = len(order) - base
    if steps < 1:
        raise ConfigError(f"protocol {protocol!r}: the number of steps must be at least 1")
    if rest < steps or rest % steps:
        fits = [str(n) for n in range(1, max(rest, 0) + 1) if rest % n == 0]
        hint = f"{rest} classes after the first {base} can be dealt out in {', '.join(fits)} steps" if fits else "choose a smaller base"
        raise ConfigError(f"protocol {protocol!r} does not divide {len(order)} classes evenly: {hint}")
    size = rest // steps
    parts = [tuple(order[i : i + size]) for i in range(base, len(order), size)]
    return ([tuple(order[:base])] if base else []) + parts


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f", … ({len(names)} in all)" if len(names) > 10 else "")
