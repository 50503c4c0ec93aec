"""Removing pruned channels: which ones stay (`plan`), and the smaller network that they form (`pack`)."""

from der_fast.compaction.arena import Arena, ArenaTensor
from der_fast.compaction.pack import pack
from der_fast.compaction.plan import CompactionPlan, plan

__all__ = ["Arena", "ArenaTensor", "CompactionPlan", "pack", "plan"]
