"""The figures of a model card: PNG beside it, since some places show no SVG."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.artifacts.files import atomic_file
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.export import result_figures
from nemo_minitron.export.plot import Plot, png
from nemo_minitron.export.run import RunFiles

FIGURES = {"Perplexity": result_figures.perplexity, "Distillation": result_figures.distillation}


def write_card_figures(folder: Path, run: RunFiles) -> dict[str, str]:
    """Draws what the run's files allow into `folder`/figures. Gives title -> name beside the card; names of figures
    that could not be drawn are removed."""
    written = {}
    for title, make in FIGURES.items():
        plot, name = make(run), f"{RunFolder.figures}/{title.lower()}.png"
        if not isinstance(plot, Plot):
            (folder / name).unlink(missing_ok=True)
            continue
        with atomic_file(folder / name) as temporary:
            temporary.write_bytes(png(plot))
        written[title] = name
    return written
