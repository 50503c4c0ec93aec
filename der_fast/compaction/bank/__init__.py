"""The finished extractors: all of them run together, by whichever way is the fastest here."""

from der_fast.compaction.bank.frozen import FrozenBank

__all__ = ["FrozenBank"]
