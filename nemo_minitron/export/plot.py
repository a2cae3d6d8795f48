"""One figure: its data as CSV, its drawing as SVG with the same bytes on every run."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_minitron.artifacts.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH, NARROW = 7.0, 3.9  # inches; the narrow one is for phones, on which the text of the wide one is too small
KEPT, CUT, MUTED, INK = "#1f5f8b", "#d9722b", "#8b95a1", "#1d2733"
PAGE = {KEPT: "kept", CUT: "cut", MUTED: "faint", INK: "ink", "#000000": "ink", "#ffffff": "page"}  # colour -> variable
STAGE_COLOURS = {"teacher": INK, "pruned": CUT, "random": MUTED, "sliced": MUTED, "distilled": KEPT}
STYLE: dict[Any, object] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "text.parse_math": False,  # a '$' in a corpus's name is a dollar
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


@dataclasses.dataclass(frozen=True)
class Plot:
    """`name`: of its files; `columns`, `rows`: of the CSV; `draw(figure)` fills an empty matplotlib Figure."""

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    draw: Callable[[Figure], None]
    height: float = 3.0  # inches


def svg(plot: Plot, width: float = WIDTH) -> str:
    """The figure as an `<svg>` element `width` inches wide, without date, random ids or external links. The ids of
    another width differ, so that both may stand on one page."""
    import matplotlib
    from matplotlib.figure import Figure

    name = plot.name if width == WIDTH else f"{plot.name}-{width:g}".replace(".", "_")
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, plot.height), layout="constrained")
        plot.draw(figure)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", dpi=150, metadata=no_metadata)
    text = buffer.getvalue()
    return _with_named_ids(text[text.index("<svg") :], name)


def png(plot: Plot) -> bytes:
    """The figure as a PNG on white, for places that show no SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, plot.height), layout="constrained")
        plot.draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def in_page(drawing: str) -> str:
    """The same drawing with the page's colours in place of fixed ones: they follow its light or dark scheme."""
    return re.sub(
        r"\b(fill|stroke): (#[0-9a-f]{6})\b",
        lambda found: f"{found[1]}: var(--{PAGE[found[2]]}, {found[2]})" if found[2] in PAGE else found[0],
        drawing,
    )


def _with_named_ids(drawing: str, name: str) -> str:
    """Puts the figure's name in front of all ids, because ids must differ between the figures of one page."""
    drawing = re.sub(r'(<[^<>]*\bid=")', rf"\g<1>{name}-", drawing)
    return re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", drawing)


def write_plot(folder: Path, plot: Plot, name: str = "") -> str:
    """Writes NAME.svg and NAME.csv into `folder`, by default under the plot's name; returns the SVG's text."""
    drawing, name = svg(plot), name or plot.name
    with atomic_file(folder / f"{name}.svg") as temporary:
        temporary.write_text('<?xml version="1.0" encoding="utf-8"?>\n' + drawing, encoding="utf-8")
    write_rows(folder / f"{name}.csv", plot.columns, plot.rows)
    return drawing


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Writes a CSV file atomically."""
    with atomic_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_plain(value) for value in row] for row in rows)


def _plain(value: object) -> object:
    """A plain value for the CSV; nine digits represent an fp32 score exactly."""
    if isinstance(value, np.float32):
        return f"{value:.9g}"
    return int(value) if isinstance(value, bool | np.bool_) else value


def log_axis(axes: Axes, which: str, low: float, high: float) -> None:
    """A logarithmic axis from `low` to `high`, labelled with plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axis.set_major_formatter(FuncFormatter(plain_number))
    axis.set_minor_locator(NullLocator())


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between `low` and `high`: powers of ten and, over few decades, multiples of these."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    step = math.ceil(len(decades) / 7)
    for factors in ((1, 2, 5), (1, 2, 3, 4, 6, 8)) if high / low < 200 else ((1,),):
        ticks = [f * 10.0**d for d in decades if d % step == 0 for f in factors if low <= f * 10.0**d <= high]
        if len(ticks) > 1:
            return ticks
    return sorted({float(f"{low * (high / low) ** part:.2g}") for part in (0.1, 0.5, 0.9)})


def plain_number(value: float, _: object = None) -> str:
    """0.02, 1,000, 1e6; matplotlib's own format uses mathematical notation, which is switched off."""
    if 1e-4 < value < 1e6:
        return f"{value:,.0f}" if value >= 1 else f"{value:g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def is_narrow(figure: Any) -> bool:
    """Whether a figure is drawn for a phone."""
    return bool(figure.get_figwidth() <= NARROW)


def thousands(axis: Axis) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=4 if is_narrow(axis.axes.figure) else 7, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def layer_ticks(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=10, integer=True, steps=[1, 2, 5, 10]))
