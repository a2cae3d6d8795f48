"""A model and a corpus -> Scores."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_minitron.artifacts import Scores
from nemo_minitron.families import resolve
from nemo_minitron.job.commands.corpus import cache_of, tokenise
from nemo_minitron.job.launch import launch
from nemo_minitron.job.layout import Layout
from nemo_minitron.job.recipe import Calibration


def run_estimate(
    model: str, data: str, out: Path, calibration: Calibration, layout: Layout, log: Path | None = None
) -> Scores:
    """Scores of a model into `out`, in the processes of the layout. Raises InputError."""
    from nemo_minitron.nemo.sources import open_source

    source = open_source(model)
    layout.check(source.architecture)
    layout.check_sequence(calibration.sequence_length)
    work = cache_of(out)
    tokens = tokenise(data, source.folder, work / "calibration")
    settings = {
        "model": str(resolve(model)), "data": str(tokens.prefix), "out": str(out), "index": str(work / "index"),
        "calibration": dataclasses.asdict(calibration), "layout": dataclasses.asdict(layout),
    }  # fmt: skip
    launch("estimate", settings, layout.processes, log)
    return Scores.load(out)
