"""What every configuration key may hold, and the check that refuses anything else before work starts."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from der_fast.config.schema import Config
from der_fast.config.tree import flatten, from_dict, key_methods, to_dict
from der_fast.errors import ConfigError, Spelling

BACKBONES = ("resnet18", "resnet34", "resnet50", "preact_resnet18", "resnet20", "resnet32")
STEMS = ("auto", "imagenet", "small")
BACKENDS = ("auto", "reference", "fused")
# What `der_fast.training.methods` has; whoever registers another adds its name.
METHODS = ["der", "replay", "bound"]
READERS = ("auto", "memory", "dali", "pillow")
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Rule:
    """The values one key takes: in words, and as a test of a value that already has the key's type."""

    takes: str
    accepts: Callable[[Any], bool]


def _at_least(low: float, what: str = "a whole number") -> Rule:
    return Rule(f"{what} of at least {low}", lambda value: low <= value < math.inf)


def _above_zero() -> Rule:
    return Rule("a number above 0", lambda value: 0 < value < math.inf)


def _between(low: float, high: float) -> Rule:
    return Rule(f"a number from {low} to {high}", lambda value: low <= value <= high)


def _one_of(choices: tuple[str, ...]) -> Rule:
    return Rule(f"one of {', '.join(choices)}", lambda value: value in choices)


def _channels(rule: Rule) -> Rule:
    return Rule(f"three values, each {rule.takes}", lambda values: all(rule.accepts(value) for value in values))


def _is_increasing(values: tuple[int, ...]) -> bool:
    return all(value >= 1 for value in values) and all(a < b for a, b in itertools.pairwise(values))


def _are_names(names: tuple[str, ...]) -> bool:
    return bool(names) and all(names)


_SWITCH = Rule("true or false", lambda value: True)
_TEXT = Rule("a text that is not empty", lambda value: bool(value.strip()))
_SEED = Rule("a whole number from 0 to 2⁶³ − 1", lambda value: 0 <= value <= LARGEST_SEED)

_SCHEDULE = {
    "epochs": _at_least(1),
    "lr": _above_zero(),
    "milestones": Rule("epochs in increasing order, the first at least 1", _is_increasing),
    "gamma": Rule("a number above 0, at most 1", lambda value: 0 < value <= 1),
    "warmup_epochs": _at_least(0),
    "warmup_lr": _at_least(0, "a number"),
    "momentum": Rule("a number of at least 0, below 1", lambda value: 0 <= value < 1),
    "weight_decay": _at_least(0, "a number"),
    # Batch-norm cannot train on a single image.
    "batch_size": _at_least(2),
}

RULES: dict[str, Rule] = {
    "data.name": _TEXT,
    "data.root": _TEXT,
    "data.download": _SWITCH,
    "data.image_size": Rule("a whole number from 4 to 1024", lambda value: 4 <= value <= 1024),
    "data.train_per_class": _at_least(1),
    "data.test_per_class": _at_least(1),
    "data.test_share": Rule("a number above 0 and below 1", lambda value: 0 < value < 1),
    "data.crop_padding": Rule("a whole number from 0 to 128", lambda value: 0 <= value <= 128),
    "data.flip": _SWITCH,
    "data.brightness": _between(0, 1),
    "data.random_resized_crop": _SWITCH,
    "data.mean": _channels(_between(0, 1)),
    "data.std": _channels(_above_zero()),
    "data.max_gib": _above_zero(),
    "data.test_list": _TEXT,
    "data.classes": Rule("one or more class names, none of them twice", lambda names: 0 < len(names) == len(set(names)) and all(names)),
    "data.reader": _one_of(READERS),
    "data.workers": _at_least(0),
    "data.prefetch": Rule("a whole number from 1 to 64", lambda value: 1 <= value <= 64),
    "data.timeout": _above_zero(),
    "data.cache_gib": _at_least(0, "a number"),
    "data.hardware_load": _between(0, 1),
    "data.width_hint": _at_least(0),
    "data.height_hint": _at_least(0),
    "protocol.name": _TEXT,
    "protocol.steps": Rule("one or more lists of class names, none of them empty", lambda steps: steps and all(map(_are_names, steps))),
    # Names that come twice are refused by name: a list of a hundred classes says little about which it is.
    "protocol.class_order": Rule("two or more class names, none of them twice", lambda names: len(names) > 1 and all(names)),
    "protocol.class_order_seed": _SEED,
    "model.backbone": _one_of(BACKBONES),
    "model.width": Rule("a whole number from 1 to 1024", lambda value: 1 <= value <= 1024),
    "model.stem": _one_of(STEMS),
    "masks.enabled": _SWITCH,
    "masks.s_max": Rule("a number above 1", lambda value: 1 < value < math.inf),
    "masks.lr": _at_least(0, "a number"),
    "masks.init_low": _between(-100, 100),
    "masks.init_high": _between(-100, 100),
    "masks.clamp": _above_zero(),
    "masks.sparsity": _at_least(0, "a number"),
    "masks.target_params": Rule("a share above 0, at most 1", lambda value: 0 < value <= 1),
    "masks.price_power": _at_least(0, "a number"),
    "masks.settle": Rule("a share of at least 0, below 1", lambda value: 0 <= value < 1),
    "masks.floor": _between(0, 1),
    "masks.multiple": Rule("a whole number from 1 to 1024", lambda value: 1 <= value <= 1024),
    "masks.bn_images": _at_least(0),
    **{f"{stage}.{name}": rule for stage in ("first", "later", "classifier") for name, rule in _SCHEDULE.items()},
    "classifier.epochs": _at_least(0),
    "classifier.temperature": _above_zero(),
    "memory.total": _at_least(0),
    "memory.per_class": _at_least(0),
    "method.name": Rule(f"one of {', '.join(METHODS)}", lambda value: value in METHODS),
    "method.aux_weight": _at_least(0, "a number"),
    "method.fwt": _SWITCH,
    "runtime.seed": _SEED,
    "runtime.device": Rule("cpu, cuda, cuda:<number> or auto", lambda value: re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is not None),
    "runtime.backend": _one_of(BACKENDS),
    "runtime.precision": _one_of(("fp32", "bf16")),
    "runtime.threads": _at_least(1),
    "runtime.channels_last": _SWITCH,
    "runtime.tune_allocator": _SWITCH,
    "runtime.eval_batch_size": _at_least(1),
    "runtime.keep_checkpoints": _at_least(1),
    "runtime.checkpoint_seconds": _at_least(0, "a number"),
    "runtime.tensorboard": _SWITCH,
}


def check(config: Config) -> Config:
    """Return `config` with every value in its type and range.

    Lists become tuples and whole numbers become floats where a key takes a float, so that a tree built by hand equals
    the one read back from its JSON. The protocol's syntax is checked where protocols are made.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, or two keys that contradict each other;
            the message names key, value and what the key takes.
    """
    config = from_dict(to_dict(config))
    refuse_repeats(config.protocol.class_order or ())
    refuse_repeats([name for names in config.protocol.steps or () for name in names], "protocol.steps")
    for dotted, value in flatten(to_dict(config)).items():
        rule = RULES[dotted]
        if value is not None and not rule.accepts(value):
            raise ConfigError(f"{dotted} takes {rule.takes}, not {value!r}")
    _check_pairs(config)
    return config


def refuse_others(config: Config, changes: Iterable[str]) -> None:
    """Refuse keys that were set although the configuration's method does not know them; raises ConfigError with their names.

    Args:
        config: the resolved configuration.
        changes: the dotted keys that a person set; what presets and defaults hold is passed over.
    """
    owners = key_methods()
    foreign = {key: owner for key in changes if (owner := owners.get(key)) not in (None, config.method.name)}
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
    """Refuse values that are each in range but contradict each other."""
    if config.data.reader in ("dali", "pillow") and not config.data.random_resized_crop:
        raise ConfigError(
            f"data.reader={config.data.reader!r} reads photos, which need data.random_resized_crop=true; for small images use 'memory'"
        )
    if config.protocol.steps is not None and config.protocol.class_order is not None:
        raise ConfigError("protocol.steps and protocol.class_order both say in which order classes arrive; leave one out")
    masks = config.masks
    if masks.init_low > masks.init_high:
        raise ConfigError(f"masks.init_low ({masks.init_low}) must not be above masks.init_high ({masks.init_high})")
    if max(abs(masks.init_low), abs(masks.init_high)) > masks.clamp:
        raise ConfigError(f"masks.init_low and masks.init_high must lie within ± masks.clamp ({masks.clamp}), or no logit keeps its start")
    if masks.enabled and masks.init_high <= 0:
        raise ConfigError(
            f"masks.init_high ({masks.init_high}) must be above 0: a channel is kept where its logit is, so all would start dead"
        )
    for stage in ("first", "later", "classifier"):
        schedule = getattr(config, stage)
        if schedule.warmup_epochs and schedule.warmup_epochs >= schedule.epochs:
            raise ConfigError(
                f"{stage}.warmup_epochs ({schedule.warmup_epochs}) must be below {stage}.epochs ({schedule.epochs}); "
                f"leave {stage}.warmup_epochs out, and the recipe's warm-up moves with the epochs"
            )
