"""Cutting pruned channels away: which stay (`plan`), and the smaller network that they make (`pack`)."""

from der_fast.compaction.pack import compact, compaction_error
from der_fast.compaction.plan import CompactionPlan, plan

__all__ = ["CompactionPlan", "compact", "compaction_error", "plan"]
