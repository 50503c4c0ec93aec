"""Pictures of channel masks: what every step kept, and the path of the mask logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from der_fast.report import style
from der_fast.report.record import RunRecord
from der_fast.report.trajectory import MaskTrajectory

_LINES = 24


def kept_channels(run: RunRecord) -> style.Picture | None:
    """Draw the share of channels kept per group (row) and step (column); None if no step has masks."""
    if not any(run.kept):
        return None
    groups = list(dict.fromkeys(group for row in run.kept for group in row))
    shares, counts = _kept_grid(run.kept, groups)
    height = 1.3 + 0.26 * len(groups)
    figure = style.new_figure(9.2, min(height, 14.0))
    axes = figure.add_subplot()
    names = []
    for row, group in enumerate(groups, start=1):
        total = max(table[group][1] for table in run.kept if group in table)
        names.append(f"{style.drawable(group, f'group {row}', 32)}  ({total})")
    axes.set_yticks(range(len(groups)), names, fontsize=8.5 if len(groups) <= 40 else 6.0)
    if len(run.kept) == 1:
        _draw_single_step(axes, shares[:, 0], counts[:, 0])
    else:
        _draw_steps(figure, axes, shares, counts)
    axes.tick_params(length=0)
    kept, total = np.nansum(counts), sum(pair[1] for row in run.kept for pair in row.values())
    caption = (
        f"Every row is a group of channels that share one mask (its size in brackets); every number counts the channels kept: "
        f"{kept:.0f} of {total} over all steps."
    )
    return style.picture(figure, "kept_channels", "Channels kept per layer and step", caption)


def _kept_grid(kept: Sequence[Mapping[str, tuple[int, int]]], groups: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    shares = np.full((len(groups), len(kept)), np.nan)
    counts = shares.copy()
    for step, row in enumerate(kept):
        for index, group in enumerate(groups):
            if group in row:
                counts[index, step] = row[group][0]
                shares[index, step] = 100 * row[group][0] / max(row[group][1], 1)
    return shares, counts


def _draw_single_step(axes: Axes, shares: NDArray[np.float64], counts: NDArray[np.float64]) -> None:
    rows = np.arange(len(shares))
    axes.barh(rows, np.full(len(shares), 100.0), color=style.FAINT, height=0.7)
    axes.barh(rows, shares, color=style.RUN, height=0.7)
    for row, (share, count) in enumerate(zip(shares, counts, strict=True)):
        if np.isfinite(count):
            inside = share > 92
            axes.text(share + (-1 if inside else 1), row, f"{count:.0f}", ha="right" if inside else "left", va="center",
                      fontsize=8, color="white" if inside else style.INK)  # fmt: skip
    axes.set_xlabel("% of the group's channels kept")
    axes.set_xlim(0, 100)
    axes.set_ylim(len(shares) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)


def _draw_steps(figure: Figure, axes: Axes, shares: NDArray[np.float64], counts: NDArray[np.float64]) -> None:
    image = axes.imshow(shares, cmap=style.SHARES, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    steps = shares.shape[1]
    ticks = style.step_ticks(steps)
    axes.set_xticks([tick - 1 for tick in ticks], [str(tick) for tick in ticks])
    axes.set_xlabel("step")
    for spine in axes.spines.values():
        spine.set_visible(False)
    if steps <= 20 and len(shares) <= 40:
        for row, column in np.argwhere(np.isfinite(counts)):
            color = "white" if shares[row, column] > 60 else style.INK
            axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", fontsize=8, color=color)
        axes.set_xticks(np.arange(steps - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(len(shares) - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2)
        axes.tick_params(which="minor", length=0)
    figure.colorbar(image, ax=axes, shrink=0.9, pad=0.015, aspect=30).set_label("% of the group's channels")


def mask_trajectories(masks: MaskTrajectory) -> style.Picture:
    """Draw one step's mask logits over its epochs: bands and single channels by kind, channels alive in total and per group."""
    kinds = masks.kinds()
    lower_height = 3.4 if len(masks.groups) <= 20 else min(7.0, 1.2 + 0.11 * len(masks.groups))
    figure = style.new_figure(9.2, 2.8 + lower_height)
    upper, lower = figure.subfigures(2, 1, height_ratios=[2.8, lower_height], squeeze=False)[:, 0]
    panels = upper.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, (kind, chosen) in zip(panels, kinds.items(), strict=True):
        _draw_logits(axes, masks, kind, chosen)
    panels[0].set_ylabel("mask logit e")
    upper.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=5)
    alive, groups = lower.subplots(1, 2, width_ratios=[1, 1.25])
    _draw_alive(alive, masks, kinds)
    _draw_groups(lower, groups, masks)
    return style.picture(figure, f"masks_step_{masks.step:02d}", f"Mask trajectories, step {masks.step}", _mask_caption(masks))


def _draw_logits(axes: Axes, masks: MaskTrajectory, kind: str, chosen: NDArray[np.bool_]) -> None:
    logits, epochs = masks.logits[:, chosen], masks.times
    low, quarter, median, three_quarters, high = np.quantile(logits, [0.05, 0.25, 0.5, 0.75, 0.95], axis=1)
    axes.fill_between(epochs, low, high, color=style.RUN, alpha=0.12, linewidth=0, label="5–95 %")
    axes.fill_between(epochs, quarter, three_quarters, color=style.RUN, alpha=0.22, linewidth=0, label="25–75 %")
    # Channels evenly spaced by their final logit show kept and dropped ones in their true proportion.
    order = np.argsort(logits[-1], kind="stable")
    for channel in order[np.unique(np.linspace(0, len(order) - 1, _LINES).round().astype(int))]:
        color = style.GREEN if logits[-1, channel] > 0 else style.WARM
        axes.plot(epochs, logits[:, channel], color=color, linewidth=0.7, alpha=0.75)
    axes.plot(epochs, median, color=style.RUN, linewidth=2.2, label="median")
    axes.axhline(0, color=style.INK, linewidth=0.9)
    axes.plot([], [], color=style.GREEN, linewidth=1.2, label="kept")
    axes.plot([], [], color=style.WARM, linewidth=1.2, label="dropped")
    axes.set_title(f"{kind} ({chosen.sum()})")
    _epoch_axis(axes, masks)


def _epoch_axis(axes: Axes, masks: MaskTrajectory) -> None:
    axes.set_xlabel("epoch")
    axes.set_xlim(0, max(masks.epochs, 0.1))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    if masks.settled_from is not None:
        start = masks.settled_from - 1
        axes.axvspan(start, masks.epochs, color=style.MUTED, alpha=0.1, linewidth=0)
        axes.axvline(start, color=style.MUTED, linewidth=0.8, linestyle=(0, (2, 2)))


def _draw_alive(axes: Axes, masks: MaskTrajectory, kinds: Mapping[str, NDArray[np.bool_]]) -> None:
    style.grid_lines(axes)
    for (kind, chosen), color in zip(kinds.items(), style.CYCLE, strict=False):
        share = 100 * masks.alive[:, chosen].mean(axis=1)
        axes.plot(masks.times, share, color=color, marker="o", markersize=3 if len(masks.times) <= 40 else 0, label=kind)
    axes.set_ylim(0, 104)
    axes.set_title("channels alive (e > 0), %", pad=24)
    _epoch_axis(axes, masks)
    style.legend_above(axes, columns=2)


def _draw_groups(figure: SubFigure, axes: Axes, masks: MaskTrajectory) -> None:
    shares = 100 * masks.alive_share_per_group()
    # A row is valid until the next one; the last one, which decides, gets its own strip.
    edges = np.append(masks.times, masks.times[-1] + 0.03 * max(masks.epochs, 1))
    mesh = axes.pcolormesh(edges, np.arange(len(shares) + 1) - 0.5, shares, cmap=style.SHARES, vmin=0, vmax=100)
    axes.invert_yaxis()
    names = [style.drawable(name, f"group {row}", 24) for row, name in enumerate(masks.groups, 1)]
    axes.set_yticks(range(len(names)), names, fontsize=7.5 if len(names) <= 20 else 5.5)
    axes.tick_params(axis="y", length=0)
    axes.set_title("channels alive per group, %")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    for spine in axes.spines.values():
        spine.set_visible(False)
    if masks.settled_from is not None:
        axes.axvline(masks.settled_from - 1, color=style.INK, linewidth=0.8, linestyle=(0, (2, 2)))
    figure.colorbar(mesh, ax=axes, pad=0.02, aspect=30)


def _mask_caption(masks: MaskTrajectory) -> str:
    channels, learned = masks.logits.shape[1], masks.alive[: masks.learned]
    wavering = int((masks.crossings() > 1).sum())
    cut = int((learned[-1] & ~masks.alive[-1]).sum())
    ended = f"{int(masks.alive[-1].sum())} of {channels} channels are kept. The losses alone moved {int((~learned[-1]).sum())} below zero"
    budget = f", and {cut} more were cut, lowest first, to meet the budget" if cut else ""
    settled = f"; from epoch {masks.settled_from} on (shaded) the masks are held binary" if masks.settled_from is not None else ""
    share = masks.led_from_the_start()
    led = "" if share is None else f" {100 * share:.0f} % of those kept led their groups when the step began."
    return f"{ended}{budget}.{led} While they were learned, {style.plural(wavering, 'channel')} crossed zero more than once{settled}."
