"""A compact extractor as a plain function, for loops over extractors."""

from __future__ import annotations

from torch import Tensor

from der_fast.compaction.bank.execute import execute
from der_fast.compaction.bank.extractor import CompactExtractor
from der_fast.compaction.bank.graphs import Branch
from der_fast.compaction.bank.strategies import true_features


def branch(member: CompactExtractor) -> Branch:
    """Return a compact extractor as a plain function of images in its dtype."""
    runnable = member.runnable

    def run(images: Tensor) -> Tensor:
        return true_features(runnable, execute(runnable.arena.ops, runnable.tensors, images))

    return run
