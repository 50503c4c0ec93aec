"""Keys of earlier versions, as saved configurations hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def present_keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved configuration, nested, with the keys of this version; the one given is left unchanged.

    Up to version 0.1 two switches said what `method.name` says now, the class order's seed was for PyTorch's generator, and every epoch had
    fresh crops.
    """
    tree = dict(tree)
    runtime = tree.get("runtime")
    if isinstance(runtime, Mapping) and "seed" in runtime and "features_gib" not in runtime:
        tree |= {stage: {"views": 0, **tree[stage]} for stage in ("later", "classifier") if isinstance(tree.get(stage), Mapping)}
    method = tree.get("method")
    if isinstance(method, Mapping) and ("expand" in method or "bound" in method):
        rest = {name: value for name, value in method.items() if name not in ("expand", "bound")}
        name = "bound" if method.get("bound") else "der" if method.get("expand", True) else "replay"
        tree["method"] = {"name": name, **rest}
        tree["protocol"] = _with_named_order(tree.get("protocol", {}))
    return tree


def _with_named_order(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Name the order that a seed stood for: the rest of a run's steps follow from it."""
    seed = protocol.get("class_order_seed", 1993)
    order = protocol.get("class_order")
    if order is None and protocol.get("steps") is None and seed is not None:
        order = f"torch-{seed}"
    return {**protocol, "class_order": order, "class_order_seed": None}
