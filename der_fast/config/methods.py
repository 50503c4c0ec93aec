"""The methods by name, each with what it is: what `method.name` and `--method` take and say.

`der_fast.training.methods` has one implementation of each.
"""

from __future__ import annotations

METHODS: dict[str, str] = {
    "der": "an extractor per step, with channel masks",
    "replay": "one extractor, same memory ('without expansion')",
    "bound": "one extractor, trained from scratch on all data of all seen classes: the upper bound",
}
