"""The methods by name, each with its meaning: the values of `method.name` and `--method`, and their documentation.

`der_fast.training.methods` has one implementation of each.
"""

from __future__ import annotations

METHODS: dict[str, str] = {
    "der": "an extractor per step, with channel masks",
    "replay": "one extractor, same memory ('without expansion')",
    "bound": "one extractor, trained from scratch on all data of all seen classes: the upper bound",
}
