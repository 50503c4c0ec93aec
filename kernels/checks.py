"""What every operation checks alike."""

from __future__ import annotations

from collections.abc import Sequence

BACKENDS = ("reference", "fused")


def check_backend(op: str, backend: str, backends: Sequence[str] = BACKENDS) -> None:
    """Raise ValueError unless `backend` is one of those that the operation has."""
    if backend not in backends:
        raise ValueError(f"{op}: unknown backend {backend!r}: choose from {', '.join(backends)}")
