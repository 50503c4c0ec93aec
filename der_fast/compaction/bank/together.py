"""A bank on a GPU: its extractors on parallel streams, or all of them in one launch per layer, whichever is faster here.

Either is captured into a CUDA graph per shape of the images. Which is faster is measured once per bank size, image size and GPU, and
remembered with the other strategies (`choices`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from der_fast.compaction.bank.extractor import CompactExtractor
from der_fast.compaction.bank.graphs import Branch, GraphedBranches
from der_fast.compaction.bank.grouped import GroupedProgram, reason_against
from der_fast.compaction.bank.strategies import GROUPED, STREAMS
from der_fast.kernels.choices import Choices

_log = logging.getLogger(__name__)


class Together:
    """Runs all members of a bank on one CUDA device.

    Args:
        members: compact extractors; any other function of the images excludes 'grouped'.
        strategy: 'streams' or 'grouped'; anything else takes the faster one. If 'grouped' cannot run, 'streams' does.
        choices: remembers which one is faster.

    Attributes:
        reason: why 'grouped' cannot run; '' if it can.
    """

    def __init__(self, members: Sequence[Branch], strategy: str, choices: Choices) -> None:
        self.strategy, self.choices = strategy, choices
        self._ways = {STREAMS: GraphedBranches(members)}
        self._picked: dict[str, str] = {}
        self.reason = "not asked for"
        if strategy == STREAMS:
            return
        compact = [member for member in members if isinstance(member, CompactExtractor)]
        self.reason = "a dense extractor is among them" if len(compact) < len(members) else ""
        arenas, dtypes = [member.arena for member in compact], [member.dtype for member in compact]
        self.reason = self.reason or reason_against(arenas, dtypes)
        if self.reason:
            _log.info("frozen extractors run on parallel streams, not grouped: %s", self.reason)
            return
        self._ways[GROUPED] = GraphedBranches([GroupedProgram(arenas, dtypes[0])])
        live = [arena for arena in arenas if arena.ops]
        weights = sum(arena.stored_parameters for arena in live).bit_length()
        kind = str(dtypes[0]).removeprefix("torch.")
        self._name = f"{live[0].architecture.name}|{kind}|bank of {len(live)}|2^{weights}"

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of all members side by side; the caller owns them."""
        return self._ways[self._chosen(images)](images)

    def _chosen(self, images: Tensor) -> str:
        if self.strategy in self._ways or GROUPED not in self._ways:
            return self.strategy if self.strategy in self._ways else STREAMS
        key = self._key(images)
        if key not in self._picked:
            if torch.cuda.is_current_stream_capturing():
                # Nothing can be measured inside another graph. Its owner runs everything once before, so a choice is known by then.
                return self.choices.known(key, self._ways, images.device) or STREAMS
            self._picked[key] = self._measured(key, images)
        return self._picked[key]

    def _measured(self, key: str, images: Tensor) -> str:
        runs = {name: functools.partial(way, images) for name, way in self._ways.items()}
        try:
            chosen = self.choices.fastest(
                key, runs, device=images.device, what="frozen extractors run together as", trusted=(STREAMS,), tensors=_features
            )
        except Exception as error:  # a kernel that does not compile or fit here must not end a run that can go on without it
            self._ways.pop(GROUPED)
            self.reason = f"{type(error).__name__}: {error}"
            _log.warning("frozen extractors run on parallel streams, because the grouped kernel failed: %s", self.reason)
            return STREAMS
        for name, way in self._ways.items():
            if name != chosen:
                way.forget()
        return chosen

    def _key(self, images: Tensor) -> str:
        gpu = torch.cuda.get_device_name(images.device)
        count = 1 << (len(images) - 1).bit_length()
        return f"{self._name}|{gpu}|{count}x{images.shape[2]}x{images.shape[3]}"


def _features(result: object) -> list[Tensor | None]:
    return [cast(Tensor, result)]
