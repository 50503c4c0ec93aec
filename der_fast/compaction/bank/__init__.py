"""The finished extractors: all of them run together, by the strategy that is fastest here."""

from der_fast.compaction.bank.frozen import FrozenBank

__all__ = ["FrozenBank"]
