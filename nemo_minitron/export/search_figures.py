"""Figures of a search: the shapes that are worth their cost, and the ranks of brief distillation over steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_minitron.artifacts import records
from nemo_minitron.artifacts.files import read_json
from nemo_minitron.artifacts.json_types import JsonFields
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.export import formatting
from nemo_minitron.export.plot import CUT, KEPT, MUTED, Plot, is_narrow, layer_ticks
from nemo_minitron.export.run import RunFiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import ColorType as Colour


def pareto(rows: Sequence[JsonFields], cost: str = "parameters", chosen: str = "") -> Plot:
    """`rows` of candidates with `name`, `cost`, `kept` (the proxy) and, if it was measured, `loss`.

    `chosen`: the name of the candidate that became the plan; it is marked. The figure shows the loss if any row has
    one, else the share kept, else only the order of costs.
    """
    value = next((name for name in ("loss", "kept") if any(row.get(name) is not None for row in rows)), "")
    shown = [row for row in rows if not value or row.get(value) is not None]
    data = [
        (row["name"], row[cost], row.get(value), _best(row, shown, cost, value), row["name"] == chosen) for row in shown
    ]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for front, colour, label in ((False, MUTED, "candidate"), (True, KEPT, "no other beats it in both")):
            points = sorted((float(x), float(y or 0)) for _, x, y, on, _ in data if on == front)
            if points:
                line = "-" if front else ""
                axes.plot(*zip(*points, strict=True), marker="o", linestyle=line, color=colour, label=label)
        for _, x, y, _, mark in data:
            if mark:
                axes.plot(x, y or 0, "*", color=CUT, markersize=17, zorder=3, label="the chosen plan")
        axes.set(xlabel=cost, ylabel=_LABELS.get(value, ""))
        axes.xaxis.set_major_formatter(lambda x, _: formatting.short_count(x))
        axes.grid(color=MUTED, alpha=0.25, linewidth=0.6)
        axes.legend()

    mark = f" The star is the plan that was chosen, {chosen}." if any(row["name"] == chosen for row in shown) else ""
    caption = (
        f"{formatting.count(len(shown))} shapes of the search; " + _CAPTIONS.get(value, "there are no scores.") + mark
    )
    return Plot("pareto", caption, ("name", cost, value or "kept", "front", "chosen"), data, draw)


_LABELS = {"loss": "loss before retraining (nats)", "kept": "share of importance kept (proxy)"}
_CAPTIONS = {
    "loss": "the loss is that of the cut model on held-out text, before any retraining.",
    "kept": "the share kept is a heuristic that orders shapes before any is cut.",
}


def _best(row: JsonFields, rows: Sequence[JsonFields], cost: str, value: str) -> bool:
    """Whether no other row is better at the same or a lower cost."""
    if not value:
        return False
    sign = 1 if value == "kept" else -1
    return not any(
        other[cost] <= row[cost]
        and sign * other[value] >= sign * row[value]
        and (other[cost], other[value]) != (row[cost], row[value])
        for other in rows
    )


def ranks(rows: Sequence[JsonFields]) -> Plot:
    """Ranks over steps, and the losses behind them; `rows` of brief distillation: step, candidate, loss, rank."""
    winner = first_of(rows)
    names = list(dict.fromkeys(row["candidate"] for row in rows))

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True)
        shades = [KEPT if name == winner else shade for name, shade in zip(names, _shades(len(names)), strict=True)]
        for name, colour in zip(names, shades, strict=True):
            _line(above, name, [row for row in rows if row["candidate"] == name], "rank", colour)
            _line(below, name, [row for row in rows if row["candidate"] == name], "loss", colour)
        above.set(ylabel="rank", ylim=(len(names) + 0.5, 0.5))
        layer_ticks(above.yaxis)
        below.set(xlabel="step", ylabel="distillation loss")
        handles, labels = above.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left" if is_narrow(figure) else "outside right upper")

    caption = f"{winner} wins. A line ends where its candidate was stopped; a loss is the mean since the mark before."
    columns = ("step", "candidate", "loss", "rank")
    return Plot("ranks", caption, columns, [tuple(row[name] for name in columns) for row in rows], draw, height=4.6)


def first_of(rows: Sequence[JsonFields]) -> str:
    """The candidate that is first at the last step."""
    return str(max(rows, key=lambda row: (row["step"], -row["rank"]))["candidate"])


def _line(axes: Axes, name: str, rows: Sequence[JsonFields], value: str, colour: Colour) -> None:
    axes.plot([row["step"] for row in rows], [row[value] for row in rows], "o-", markersize=4, color=colour, label=name)


def _shades(count: int) -> list[Colour]:
    from matplotlib import colormaps

    return [colormaps["YlOrBr"](0.4 + 0.5 * i / count) for i in range(count)]


def of_run(run: RunFiles, name: str) -> Plot | str:
    """The figure `pareto` or `ranks` of a run that searched."""
    files = RunFolder(run.folder)
    ranked = read_json(files.ranks, "the ranks", records.RANKS) if files.ranks.is_file() else []
    if name == "ranks":
        return ranks(ranked) if ranked else "The run made no search."
    if not files.measured.is_file():
        return "The run made no search."
    measured = read_json(files.measured, "the measured candidates", records.MEASURED)
    return pareto(measured, chosen=first_of(ranked) if ranked else "")
