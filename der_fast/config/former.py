"""Keys of earlier versions, as saved configurations hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def present_keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved configuration, nested, with the keys of this version; the given one is left unchanged.

    Up to version 0.1 two switches said what `method.name` says now.
    """
    tree = dict(tree)
    method = tree.get("method")
    if isinstance(method, Mapping) and ("expand" in method or "bound" in method):
        rest = {name: value for name, value in method.items() if name not in ("expand", "bound")}
        name = "bound" if method.get("bound") else "der" if method.get("expand", True) else "replay"
        tree["method"] = {"name": name, **rest}
    return tree
