"""The check that refuses invalid values and contradictions in a configuration before work starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from der_fast.config.schema import Config
from der_fast.config.tree import declared, flatten, from_dict, to_dict
from der_fast.errors import ConfigError, Spelling


def check(config: Config) -> Config:
    """Return `config` with every value checked for type and range.

    Lists become tuples, and whole numbers become floats where a key takes a float, so that a tree built by hand equals
    the one read back from its JSON. The protocol's syntax is checked where protocols are made.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, or two keys that contradict each other;
            the message names key, value and what the key takes.
    """
    config = from_dict(to_dict(config))
    if isinstance(config.protocol.class_order, tuple):
        refuse_repeats(config.protocol.class_order)
    refuse_repeats([name for names in config.protocol.steps or () for name in names], "protocol.steps")
    for dotted, value in flatten(to_dict(config)).items():
        rule = declared()[dotted].rule
        if value is not None and not rule.accepts(value):
            raise ConfigError(f"{dotted} takes {rule.takes}, not {value!r}")
    _check_pairs(config)
    return config


def refuse_others(config: Config, changes: Iterable[str]) -> None:
    """Refuse keys that were set but belong to another method than the configuration's; raises ConfigError with their names.

    Args:
        config: the resolved configuration.
        changes: the dotted keys that a person set; values from presets and defaults do not count.
    """
    foreign = {key: owner for key in changes if (owner := declared()[key].method) not in (None, config.method.name)}
    if foreign:
        rows = ", ".join(f"{key} is a key of {owner!r}" for key, owner in foreign.items())
        remedy = Spelling("--method", "method.name in settings")
        raise ConfigError(f"{rows}, but method.name is {config.method.name!r}; leave it out, or choose that method with ", remedy)


def refuse_repeats(order: Sequence[str], key: str = "protocol.class_order") -> None:
    """Refuse a class order (the value of `key`) that names a class more than once; raises ConfigError with those names."""
    repeated = [name for name, count in Counter(order).items() if count > 1]
    if repeated:
        raise ConfigError(f"{key} names {', '.join(map(repr, repeated))} more than once; list every class once")


def _check_pairs(config: Config) -> None:
    """Refuse values that are in range but contradict each other."""
    if config.data.reader in ("dali", "pillow") and not config.data.random_resized_crop:
        raise ConfigError(
            f"data.reader={config.data.reader!r} reads photos, which need data.random_resized_crop=true; for small images use 'memory'"
        )
    if config.protocol.steps is not None and config.protocol.class_order is not None:
        raise ConfigError("protocol.steps and protocol.class_order both set the order in which classes arrive; leave one out")
    masks = config.masks
    if masks.init_low > masks.init_high:
        raise ConfigError(f"masks.init_low ({masks.init_low}) must not be above masks.init_high ({masks.init_high})")
    if max(abs(masks.init_low), abs(masks.init_high)) > masks.clamp:
        raise ConfigError(
            f"masks.init_low and masks.init_high must lie within ± masks.clamp ({masks.clamp}), or no logit keeps its initial value"
        )
    if masks.enabled and masks.init_high <= 0:
        raise ConfigError(
            f"masks.init_high ({masks.init_high}) must be above 0: a channel is kept if its logit is, so all would start dead"
        )
    for stage in ("first", "later", "classifier"):
        schedule = getattr(config, stage)
        if schedule.warmup_epochs and schedule.warmup_epochs >= schedule.epochs:
            raise ConfigError(
                f"{stage}.warmup_epochs ({schedule.warmup_epochs}) must be below {stage}.epochs ({schedule.epochs}); "
                f"leave {stage}.warmup_epochs out, and the recipe's warm-up moves with the epochs"
            )
