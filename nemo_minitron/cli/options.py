"""Options that several commands share, and how each reads on the screen."""

from __future__ import annotations

import os
from typing import Annotated, Optional

import typer

from nemo_minitron.launch.stall import VARIABLE
from nemo_minitron.precisions import PRECISIONS

SOURCES = "Text file, JSONL, .bin/.idx prefix, or `datasets` NAME, NAME:CONFIG, NAME@SPLIT"
Data = Annotated[str, typer.Option("--data", help=f"{SOURCES}; the train split unless given.")]
HeldOut = Annotated[Optional[str], typer.Option("--data", help=f"{SOURCES}; the test split unless given.")]
SkipBadLines = Annotated[
    bool, typer.Option("--skip-bad-lines", help="Leave out lines that cannot be read, and count them.")
]
Tp = Annotated[int, typer.Option("--tp", help="Tensor-parallel size.")]
Pp = Annotated[int, typer.Option("--pp", help="Pipeline stages.")]
Vp = Annotated[int, typer.Option("--vp", help="Virtual stages a pipeline stage.")]
Cp = Annotated[int, typer.Option("--cp", help="Context-parallel size: ranks that share a sequence.")]
Ep = Annotated[int, typer.Option("--ep", help="Expert-parallel size, of mixtures of experts.")]
Etp = Annotated[int, typer.Option("--etp", help="Tensor-parallel size of experts; 0: as --tp.")]
Dp = Annotated[int, typer.Option("--dp", help="Data-parallel size.")]
Sp = Annotated[bool, typer.Option("--sp", help="Sequence parallelism within tensor-parallel groups.")]
Precision = Annotated[str, typer.Option("--precision", help=f"{', '.join(PRECISIONS)}, or auto.")]
Length = Annotated[int, typer.Option("--sequence-length", help="Tokens of a sample.")]
Seed = Annotated[int, typer.Option("--seed")]


def _set_stall(seconds: int) -> int:
    """For whatever starts processes; the environment reaches the workers too."""
    os.environ[VARIABLE] = str(seconds)
    return seconds


_STALL = "Seconds without progress of any rank until a stage is ended; 0: no limit."
Stall = Annotated[int, typer.Option("--stall-timeout", min=0, envvar=VARIABLE, callback=_set_stall, help=_STALL)]
