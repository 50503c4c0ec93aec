"""The common look of all pictures, and the format of numbers."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

# Blue and orange remain distinct in every common form of colour blindness; grey is for what the run is compared with.
INK, MUTED, FAINT = "#1d2733", "#64707d", "#dfe4ea"
RUN, RUN_LIGHT, OTHER, WARM, GREEN = "#2563a8", "#9cc0e6", "#9aa5b1", "#d9772b", "#2f8f6b"
CYCLE = (RUN, WARM, GREEN, "#8d5bb5", "#b8433f", "#4a9fb5", "#8a7a2c", "#6b6f76")
SHARES = LinearSegmentedColormap.from_list("shares", ["#f7f9fc", "#c9ddf1", "#7fb0dd", "#2f74b8", "#123f73"])
DPI = 150

# `Any`: matplotlib's versions type the names of its settings differently.
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": "figure",
    "savefig.bbox": None,
}


@dataclass(frozen=True)
class Picture:
    """A finished picture with its title and caption.

    Attributes:
        stem: file name without ending, under RUN/figures/.
        caption: one sentence.
        png: the encoded image.
        width, height: in pixels.
    """

    stem: str
    title: str
    caption: str
    png: bytes
    width: int
    height: int


@contextmanager
def look() -> Iterator[None]:
    """Draw with this module's style; afterwards matplotlib's settings are as before. Save pictures inside, too."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches, laid out without overlaps, drawn without a window."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def picture(figure: Figure, stem: str, title: str, caption: str) -> Picture:
    """Encode a figure as PNG; equal figures give equal bytes."""
    canvas = FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    width, height = canvas.get_width_height()
    return Picture(stem, title, caption, buffer.getvalue(), width, height)


def grid_lines(axes: Axes) -> None:
    """Draw faint horizontal lines behind the data and drop the left spine."""
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def step_ticks(steps: int, most: int = 20) -> list[int]:
    """Return 1-based steps to label: all of them, or the first and round ones if there are more than `most`."""
    stride = next(stride for stride in (1, 2, 5, 10, 20, 50, 10**9) if steps <= stride * most)
    if stride <= 2:
        return list(range(1, steps + 1, stride))
    return [1, *range(stride, steps + 1, stride)]


def legend_above(axes: Axes, columns: int = 4) -> None:
    """Put the legend in one row above the axes, where it does not hide data."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncol=columns, borderaxespad=0.2, handlelength=1.8, columnspacing=1.4)


@cache
def _known_glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def drawable(text: str, otherwise: str, width: int) -> str:
    """Return a text fit for a picture: on one line, at most `width` characters, or `otherwise` if the font lacks a character."""
    text = " ".join(text.split())
    if not text or any(ord(character) not in _known_glyphs() for character in text):
        return otherwise
    return shorten(text, width)


def label(name: str, index: int, width: int = 16) -> str:
    """Return a class name fit for a picture, or its 1-based number in learning order; tables give both."""
    return drawable(name, f"class {index + 1}", width)


def shorten(text: str, width: int) -> str:
    """Cut a text to `width` characters: its beginning, an ellipsis, its end (names in a series often differ only at the end)."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail].rstrip()}…{text[-tail:].lstrip()}"


def class_set_label(step: int, names: Sequence[str], first_index: int, width: int = 22) -> str:
    """Return e.g. ``1: cat, dog``, or ``1: 10 classes`` if the names do not fit in `width` characters; `step` is 1-based."""
    if not names:
        return f"{step}: –"
    listed = ", ".join(label(name, first_index + position, width) for position, name in enumerate(names))
    return f"{step}: {listed}" if len(listed) <= width else f"{step}: {len(names)} classes"


def percent(value: float | None, digits: int = 1) -> str:
    """Write a value that is already in percent; an absent one is a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def count(value: float | None) -> str:
    """Write a number of parameters with three digits and a unit: 464 154 → ``464 k``, 11 220 132 → ``11.2 M``."""
    if value is None:
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{value:.0f}"


def count_tick(value: float, _position: int | None = None) -> str:
    """Write a number of parameters for an axis, without needless zeros: ``20 M``."""
    number, _, unit = count(value).partition(" ")
    return f"{float(number):g} {unit}".rstrip()


def signed(value: float | None, digits: int = 1) -> str:
    """Write a difference with its sign; an absent one is a dash."""
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def plural(number: int, noun: str, ending: str = "s") -> str:
    """Write a number with its noun: ``1 step``, ``5 steps``."""
    return f"{number} {noun}{ending if number != 1 else ''}"


def share(part: float | None, whole: float | None) -> str:
    """Write part / whole in percent with enough digits to be useful; a dash if either is unknown."""
    if part is None or not whole:
        return "–"
    value = 100 * part / whole
    return f"{value:.1f} %" if value < 9.95 else f"{value:.0f} %"


def duration(seconds: float | None) -> str:
    """Write a wall time: ``48 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(value: float | None) -> str:
    """Write a number of bytes with three digits and a decimal unit: 1 264 000 → ``1.26 MB``."""
    return (
        "–"
        if value is None
        else f"{count(value).replace(' k', ' kB').replace(' M', ' MB').replace(' G', ' GB')}" + ("" if value >= 999.5 else " B")
    )


def timed(value: float | None, spread: float | None) -> str:
    """Write a latency with its spread, or as less than the spread if it is below that; a negative difference counts as unknown."""
    if value is None or (spread is None and value < 0):
        return "–"
    if spread is None or spread == 0:
        return milliseconds(value)
    return f"< {milliseconds(spread)}" if value <= spread else f"{milliseconds(value)} ± {spread:.1g}"


def milliseconds(value: float | None) -> str:
    """Write a latency with three significant digits."""
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
