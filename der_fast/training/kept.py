"""Features of frozen extractors for a few fixed views of every image: each view is computed once, and then costs a gather.

Frozen extractors never change, so neither do their features of a fixed view. View v of a stage is the augmentation that the counter draws
with the view's key, and epoch e uses view e mod V. A view is computed in one pass over the images in their order, whatever the epoch's own
order is, so a resumed run computes the same bits again: nothing of this is ever saved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from der_fast.compaction.bank import FrozenBank
from der_fast.data.source import Batch, ImageSource
from der_fast.seeds import derive_seed
from der_fast.training.context import Context

# The dtype that features are kept in.
DTYPE = torch.bfloat16


def saves(views: int, epochs: int) -> bool:
    """Whether fixed views save anything; with as many views as epochs every epoch has its own, as with fresh ones."""
    return 0 < views < epochs


class KeptFeatures:
    """Keeps the features of a stage's views on the device, then in host memory; what fits in neither is computed again when needed.

    Args:
        context: settings; `runtime.features_gib` is the budget of each place.
        bank: the frozen extractors.
        source: the images.
        names: tell this stage's views from others'.
        views: V ≥ 1, number of views.
        epochs: number of epochs; views that no epoch uses again are not kept.
        chosen: positions (n,) of the images that are used, distinct; default: all.
    """

    def __init__(
        self,
        context: Context,
        bank: FrozenBank,
        source: ImageSource,
        names: tuple[str | int, ...],
        views: int,
        epochs: int,
        chosen: Tensor | None = None,
    ) -> None:
        self.context, self.bank, self.source, self.epochs = context, bank, source, epochs
        self.keys = [derive_seed(context.seed, *names, "view", view) for view in range(views)]
        self.positions = torch.arange(len(source)) if chosen is None else chosen
        # A view's features stay at this address, so that a CUDA graph may read them.
        self.current = torch.zeros(len(self.positions), bank.features, dtype=DTYPE, device=context.device)
        self._known = torch.zeros(len(self.positions), dtype=torch.bool)
        self._row_of = torch.full((len(source),), -1, dtype=torch.int64)
        self._row_of[self.positions] = torch.arange(len(self.positions))
        self._row_on_device = self._row_of.to(context.device)
        self._views: dict[int, tuple[Tensor, Tensor]] = {}
        budget = context.config.runtime.features_gib * 2**30
        self._room = {context.device: budget, torch.device("cpu"): budget}
        self._said = False

    def enter(self, epoch: int) -> int:
        """Make the features of epoch `epoch`'s view (0-based) the current ones; return the view's key."""
        view = epoch % len(self.keys)
        if view in self._views:
            features, known = self._views[view]
            self.current.copy_(features)
            self._known = known.clone()
        else:
            self.compute(self.keys[view])
            if epoch + len(self.keys) < self.epochs:
                self._keep(view)
        return self.keys[view]

    def compute(self, key: int) -> None:
        """Compute the features of the view with this key; they become the current ones."""
        done, told = 0, self.context.observer.images_pass
        self._known = torch.zeros_like(self._known)
        told("features of earlier extractors", 0, len(self.positions))
        for batch in self.context.view_batches(self.source, self.positions, key):
            self._fill(self._row_of[batch.indices], batch.images)
            done += len(batch.labels)
            told("features of earlier extractors", done, len(self.positions))

    def _fill(self, rows: Tensor, images: Tensor) -> None:
        self.current[rows.to(self.context.device)] = self.context.features(self.bank, images).to(DTYPE)
        self._known[rows] = True

    def _keep(self, view: int) -> None:
        size = self.current.numel() * self.current.element_size()
        for place, room in self._room.items():
            if size <= room:
                self._room[place] = room - size
                self._views[view] = (self.current.to(place, copy=True), self._known)
                return
        if not self._said:
            self._said = True
            self.context.observer.message(
                f"features of earlier extractors: {len(self._views)} of {len(self.keys)} views fit in "
                f"runtime.features_gib = {self.context.config.runtime.features_gib:g}; the others are computed again each time"
            )

    def complete(self, batch: Batch) -> Tensor:
        """Return the rows (N,) of a batch of the current view, on the device; features that could not be computed before are now."""
        rows = self._row_of[batch.indices]
        missing = ~self._known[rows]
        if bool(missing.any()):
            self._fill(rows[missing], batch.images[missing.to(batch.images.device)])
        return rows.to(self.context.device)

    def readable(self) -> Tensor:
        """Return the rows (m,) whose image could be read in the current view, on the CPU."""
        return self._known.nonzero().flatten()

    def rows_of(self, positions: Tensor) -> Tensor:
        """Return the rows (N,) of images by their positions (N,) in the source; on the device."""
        return self._row_on_device.index_select(0, positions)

    def gather(self, rows: Tensor) -> Tensor:
        """Return the current view's features (N, F), float32, of rows (N,); on the device."""
        return self.current.index_select(0, rows).float()
