"""Why each channel of a step stayed: its logit's path, the price of its group, the threshold, and what the start's draw would have kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from numpy.typing import NDArray

from der_fast.report import style
from der_fast.report.tables import Table
from der_fast.report.trajectory import MaskTrajectory

_PATH = 0.36


@dataclass(frozen=True)
class GroupReasons:
    """A group of channels in one step.

    Attributes:
        name: the group's.
        start, learned, end: its logits (n,) at the start, at the end of learning (before the cut) and at the end of the step.
        kept: boolean (n,).
        drawn: boolean (n,): the channels that would have been kept, as many, by the order at the start.
        correlation: Spearman's rank correlation of `start` and `learned`; None for a single channel, or if all of a row are equal.
        price: parameters per convolution that a channel costs, relative to the dearest; None if not recorded.
        threshold: what a logit had to exceed in the cut to the budget; None if not recorded.
    """

    name: str
    start: NDArray[np.float32]
    learned: NDArray[np.float32]
    end: NDArray[np.float32]
    kept: NDArray[np.bool_]
    drawn: NDArray[np.bool_]
    correlation: float | None
    price: float | None
    threshold: float | None

    @property
    def chosen(self) -> bool:
        """Whether there was a choice: some channels stayed, others did not."""
        return bool(self.kept.any()) and not bool(self.kept.all())


def reasons(masks: MaskTrajectory) -> tuple[GroupReasons, ...]:
    """Return why channels stayed, group by group."""
    found = []
    for group, (name, begin, stop) in enumerate(zip(masks.groups, masks.offsets[:-1], masks.offsets[1:], strict=True)):
        start, learned, end = (masks.logits[row, begin:stop] for row in (0, masks.learned - 1, -1))
        kept = end > 0
        drawn = np.zeros(len(kept), dtype=np.bool_)
        drawn[np.argsort(-start, kind="stable")[: int(kept.sum())]] = True
        price, threshold = (None if values is None else float(values[group]) for values in (masks.prices, masks.thresholds))
        found.append(GroupReasons(name, start, learned, end, kept, drawn, rank_correlation(start, learned), price, threshold))
    return tuple(found)


def rank_correlation(one: NDArray[np.float32], other: NDArray[np.float32]) -> float | None:
    """Return Spearman's rank correlation, equal values sharing their mean rank; None if there are fewer than two, or all are equal."""
    if len(one) < 2:
        return None
    first, second = (rank - rank.mean() for rank in (_ranks(one), _ranks(other)))
    size = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / size if size else None


def _ranks(values: NDArray[np.float32]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return ranks


def picture_of(masks: MaskTrajectory) -> style.Picture:
    """Draw a step, one row per group: the path of every channel's logit, the price, what was kept, and the rank correlation."""
    groups = reasons(masks)
    figure = style.new_figure(9.2, min(1.5 + 0.3 * len(groups), 18.0))
    paths, prices, kept, order = figure.subplots(1, 4, sharey=True, width_ratios=[3.2, 0.8, 1.3, 1.0])
    for row, group in enumerate(groups):
        _draw_paths(paths, row, group)
    rows = np.arange(len(groups))
    prices.barh(rows, [group.price or 0.0 for group in groups], color=style.OTHER, height=0.6)
    shares = 100 * np.array([[(g.kept & g.drawn).mean(), (g.kept & ~g.drawn).mean()] for g in groups])
    kept.barh(rows, np.full(len(groups), 100.0), color=style.FAINT, height=0.6)
    kept.barh(rows, shares[:, 0], color=style.RUN, height=0.6)
    kept.barh(rows, shares[:, 1], left=shares[:, 0], color=style.GREEN, height=0.6)
    known = [(row, group.correlation) for row, group in enumerate(groups) if group.correlation is not None]
    order.plot([value for _, value in known], [row for row, _ in known], "o", color=style.INK, markersize=3.5, clip_on=False)
    names = [f"{style.drawable(group.name, f'group {row}', 24)}  ({len(group.kept)})" for row, group in enumerate(groups, 1)]
    paths.set_yticks(rows, names, fontsize=8 if len(groups) <= 45 else 6)
    paths.set_ylim(len(groups) - 0.4, -0.6)
    titles = ("mask logit e: start (above) to cut (below)", "price", "% kept", "rank correlation")
    for axes, title in zip((paths, prices, kept, order), titles, strict=True):
        axes.set_title(title, fontsize=8.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    paths.axvline(0, color=style.MUTED, linewidth=0.6)
    lowest = min([0.0, *(value for _, value in known)])
    for axes, low, high in ((prices, 0.0, 1.0), (kept, 0.0, 100.0), (order, lowest, 1.0)):
        axes.set_xlim(low, high)
        # Labels in the middle only: those at the ends would touch the neighbour's.
        axes.set_xticks([low, (low + high) / 2, high], ["", f"{(low + high) / 2:.3g}", ""])
    order.grid(axis="x")
    for label, color in (("kept, as the start's draw would have", style.RUN), ("kept, risen while learning", style.GREEN)):
        paths.plot([], [], color=color, label=label)
    paths.plot([], [], color=style.OTHER, label="dropped")
    paths.plot([], [], color=style.WARM, linewidth=2, label="threshold")
    figure.legend(*paths.get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return style.picture(figure, f"reasons_step_{masks.step:02d}", f"Why channels stayed, step {masks.step}", caption(groups))


def _draw_paths(axes: Axes, row: int, group: GroupReasons) -> None:
    segments = np.empty((len(group.kept), 2, 2))
    segments[:, 0, 0], segments[:, 0, 1] = group.start, row - _PATH
    segments[:, 1, 0], segments[:, 1, 1] = group.learned, row + _PATH
    for chosen, color, alpha in (
        (~group.kept, style.OTHER, 0.45),
        (group.kept & group.drawn, style.RUN, 0.8),
        (group.kept & ~group.drawn, style.GREEN, 0.9),
    ):
        axes.add_collection(LineCollection(list(segments[chosen]), colors=color, alpha=alpha, linewidths=0.7))
    axes.autoscale_view()
    if group.threshold is not None:
        axes.plot([group.threshold] * 2, [row, row + _PATH + 0.1], color=style.WARM, linewidth=2)


def caption(groups: Sequence[GroupReasons]) -> str:
    """Say how many kept channels the start's draw explains, how the rank correlations are spread, and which thresholds there were."""
    chosen = [group for group in groups if group.chosen]
    kept = sum(int(group.kept.sum()) for group in chosen)
    drawn = sum(int((group.kept & group.drawn).sum()) for group in chosen)
    by_chance = sum(int(group.kept.sum()) ** 2 / len(group.kept) for group in chosen)
    sentences = ["No group had a choice: each kept all of its channels or none."]
    if chosen:
        sentences = [
            f"{style.plural(len(chosen), 'group')} lost some channels and kept others, {kept} in all. Of these, {drawn} would also have "
            f"been kept by the order at the start (an order unrelated to it would share {by_chance:.0f}); {kept - drawn} rose above others "
            "while masks were learned."
        ]
    known = [group.correlation for group in groups if group.correlation is not None]
    if known:
        below = sum(value < 0.5 for value in known)
        sentences.append(
            f"The rank correlation of the order at the start and at the end of learning has the median {np.median(known):.2f} over "
            f"{style.plural(len(known), 'group')} (from {min(known):.2f} to {max(known):.2f}), and is below 0.5 in {below}."
        )
    needed = [group.threshold for group in groups if group.threshold is not None]
    if not needed:
        sentences.append("The version that saved this step did not record prices and thresholds.")
    elif max(needed) > 0:
        sentences.append(
            f"To meet the budget, logits had to exceed {min(needed):.2f} to {max(needed):.2f}, dependent on their group's price."
        )
    else:
        sentences.append("No budget cut any channel: logits had to exceed 0.")
    return " ".join(sentences)


def table_of(trajectories: Iterable[MaskTrajectory]) -> Table | None:
    """Return one row per step and group; None without masks. Channels are numbered from 0 within their group."""
    rows = tuple(_row(masks.step, group) for masks in trajectories for group in reasons(masks))
    columns = (
        *("step", "group", "channels", "kept", "price", "threshold", "mean e: start", "learned", "end", "lowest kept", "highest dropped"),
        *("rank correlation", "kept as drawn", "risen", "channels that rose"),
    )
    return Table(columns, rows, leading=2) if rows else None


def _row(step: int, group: GroupReasons) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    risen = group.kept & ~group.drawn
    return (
        *(str(step), group.name, str(len(group.kept)), str(int(group.kept.sum()))),
        "–" if group.price is None else f"{group.price:.3f}",
        number(group.threshold),
        *(number(float(row.mean())) for row in (group.start, group.learned, group.end)),
        number(float(group.learned[group.kept].min()) if group.kept.any() else None),
        number(float(group.learned[~group.kept].max()) if not group.kept.all() else None),
        number(group.correlation),
        *(str(int((group.kept & group.drawn).sum())), str(int(risen.sum())), spans(np.flatnonzero(risen).tolist()) or "–"),
    )


def spans(numbers: Sequence[int]) -> str:
    """Write ascending numbers in short: 0–2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
