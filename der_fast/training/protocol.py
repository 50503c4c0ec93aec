"""How classes are divided into steps: 'B0-10', 'B50-5', '10,10,5', lists of names, any data set (docs/method.md: classes in steps)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from der_fast.config.check import refuse_repeats
from der_fast.config.protocols import FORMS, parse_even, parse_sizes
from der_fast.config.schema import ProtocolConfig
from der_fast.data.io.names import spelled
from der_fast.errors import ConfigError
from der_fast.training.orders import named_order, seeded_order


def steps_of(names: Sequence[str], config: ProtocolConfig) -> list[tuple[str, ...]]:
    """Return the class names of every step.

    Args:
        names: all classes of the data set.
        config: the steps themselves, or an order and how it is divided.

    Raises:
        ConfigError: see `class_order` and `split_steps`; a step without classes, or with a class that the data set does not have.
    """
    if config.steps is None:
        return split_steps(class_order(names, config), config.name)
    called = {spelled(name): name for name in names}
    steps = [tuple(map(spelled, step)) for step in config.steps]
    refuse_repeats([name for step in steps for name in step], "protocol.steps")
    for number, step in enumerate(steps, 1):
        _refuse_unknown([name for name in step if name not in called], names, f"step {number} of protocol.steps")
        if not step:
            raise ConfigError(f"step {number} of protocol.steps has no classes; name at least one, or leave the step out")
    return [tuple(called[name] for name in step) for step in steps]


def class_order(names: Sequence[str], config: ProtocolConfig) -> tuple[str, ...]:
    """Return the class names in the order of their arrival.

    Args:
        names: all classes of the data set.
        config: a `class_order`, by its name or as a list of class names, or the seed of one; without either, the data set's own order.

    Raises:
        ConfigError: the list repeats a class or names one that the data set does not have; a published order of another number of classes.
    """
    # Data sets list classes in different orders, and systems spell them differently.
    alphabetical = sorted(names, key=spelled)
    if isinstance(config.class_order, str):
        return tuple(alphabetical[index] for index in named_order(config.class_order, len(names)))
    if config.class_order is not None:
        order = tuple(map(spelled, config.class_order))
        refuse_repeats(order)
        called = {spelled(name): name for name in names}
        _refuse_unknown([name for name in order if name not in called], names, "protocol.class_order")
        return tuple(called[name] for name in order)
    if config.class_order_seed is None:
        return tuple(names)
    return tuple(alphabetical[index] for index in seeded_order(config.class_order_seed, len(names)))


def split_steps(order: Sequence[str], protocol: str) -> list[tuple[str, ...]]:
    """Divide the classes into steps.

    Args:
        order: classes in the order of their arrival.
        protocol: 'B0-n' (n equal steps), 'B<base>-<n>' (base classes first, the rest in n equal steps), or the sizes of all steps,
            '10,10,5'.

    Raises:
        ConfigError: the text is not a protocol, or the classes cannot be divided that way; the message says what would fit.
    """
    sizes, even = parse_sizes(protocol), parse_even(protocol)
    if sizes is not None:
        return _of_sizes(order, sizes, protocol)
    if even is None:
        raise ConfigError(
            f"protocol {protocol!r} is not of the form {FORMS}, nor a text file with one step per line, its class names separated by commas"
        )
    base, steps = even
    rest = len(order) - base
    if steps < 1:
        raise ConfigError(f"protocol {protocol!r}: the number of steps must be at least 1")
    if rest < steps or rest % steps:
        fits = [str(n) for n in range(1, max(rest, 0) + 1) if rest % n == 0]
        hint = f"{rest} classes after the first {base} can be divided into {', '.join(fits)} steps" if fits else "choose a smaller base"
        raise ConfigError(f"protocol {protocol!r} does not divide {len(order)} classes evenly: {hint}")
    size = rest // steps
    parts = [tuple(order[i : i + size]) for i in range(base, len(order), size)]
    return ([tuple(order[:base])] if base else []) + parts


def _of_sizes(order: Sequence[str], sizes: Sequence[int], protocol: str) -> list[tuple[str, ...]]:
    if 0 in sizes:
        raise ConfigError(f"protocol {protocol!r}: step {sizes.index(0) + 1} has no classes; every step needs at least one")
    if sum(sizes) != len(order):
        hint = f"; for {sizes[0]} equal steps write B0-{sizes[0]}" if len(sizes) == 1 else ""
        raise ConfigError(f"protocol {protocol!r} has {sum(sizes)} classes in total, but there are {len(order)}{hint}")
    ends = list(itertools.accumulate(sizes))
    return [tuple(order[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def _refuse_unknown(unknown: Sequence[str], names: Sequence[str], where: str) -> None:
    if unknown:
        raise ConfigError(f"{where} names {', '.join(unknown[:5])}, which the data set does not have; its classes: {_some(names)}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f", … ({len(names)} in total)" if len(names) > 10 else "")
