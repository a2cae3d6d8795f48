"""`minitron rank-tokens`: a tokenizer and text -> scores of the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemo_minitron.cli.closing import comes_next
from nemo_minitron.cli.options import Data, SkipBadLines
from nemo_minitron.schema import OUTPUT

OUT = "File of scores, to which those of the vocabulary are added."


def rank_tokens(
    model: Annotated[str, typer.Argument(help="Hugging Face folder or hub id.")],
    data: Data,
    out: Annotated[Path, typer.Option("--out", help=OUT, rich_help_panel=OUTPUT)] = Path("scores.safetensors"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the order of tokens in the file.", rich_help_panel=OUTPUT)
    ] = False,
    skip_bad_lines: SkipBadLines = False,
) -> None:
    """Count a corpus' tokens, for plans with a smaller vocabulary (`minitron plan --keep vocab=N`).

    minitron rank-tokens MODEL --data text.jsonl --out scores.safetensors
    """
    from nemo_minitron.commands.rank_tokens import rank_tokens as run

    scores = run(model, data, out, skip_bad_lines, overwrite)
    counts = scores.notes["vocab"]
    print(f"{out}: {counts['seen']:,} of {len(scores['vocab']):,} tokens occur in {counts['tokens']:,}")
    comes_next("plan", out, "--keep", f"vocab={counts['seen']}")
