"""`minitron rank-tokens`: a tokenizer and text -> which tokens matter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemo_minitron.cli.options import Data, SkipBadLines
from nemo_minitron.schema import OUTPUT

OUT = "Scores, to which it is added."


def rank_tokens(
    model: Annotated[str, typer.Argument(help="Hugging Face folder or hub id.")],
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="Scores, to which it is added.", rich_help_panel=OUTPUT)] = Path(
        "scores.safetensors"
    ),
    skip_bad_lines: SkipBadLines = False,
) -> None:
    """Count a corpus' tokens, for plans that keep fewer (`minitron plan --keep vocab=N`)."""
    from nemo_minitron.commands.rank_tokens import rank_tokens as run

    scores = run(model, data, out, skip_bad_lines)
    found = scores.notes["vocab"]
    print(f"{out}: {found['seen']:,} of {len(scores['vocab']):,} tokens occur in {found['tokens']:,}")
