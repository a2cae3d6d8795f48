"""`minitron cache-logits`: stores a teacher's logits once, for many students."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from nemo_minitron.artifacts.cache_settings import CacheSettings
from nemo_minitron.cli.closing import comes_next
from nemo_minitron.cli.nodes import Stall
from nemo_minitron.cli.options import Data, SkipBadLines
from nemo_minitron.launch.stall import SECONDS
from nemo_minitron.schema import ANY_MODEL, METHOD, MODEL, OUTPUT
from nemo_minitron.settings.layout import Layout

MODELS = f"The teacher: {ANY_MODEL}."


def cache_logits(
    model: Annotated[str, typer.Argument(help=MODELS)],
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="Folder of the cache.", rich_help_panel=OUTPUT)],
    settings: CacheSettings,
    layout: Layout,
    samples: Annotated[
        Optional[int],
        typer.Option(help="Number of rows to read. Default: all rows of the text.", rich_help_panel=MODEL),
    ] = None,
    rows_per_shard: Annotated[
        int, typer.Option(help="Rows in each file; a kill costs one unfinished file at most.", rich_help_panel=OUTPUT)
    ] = 256,
    micro_batch_size: Annotated[
        int, typer.Option(help="Rows of a micro-batch, on each rank.", rich_help_panel=METHOD)
    ] = 1,
    skip_bad_lines: SkipBadLines = False,
    stall_timeout: Stall = SECONDS,
) -> None:
    """Store a few tokens of the teacher's distribution at each position. Run the command again to resume.

    minitron cache-logits MODEL --data text.jsonl --out cache
    """
    from nemo_minitron.commands.cache import run_cache

    header = run_cache(
        model, data, out, settings, layout, samples=samples, rows_per_shard=rows_per_shard,
        micro_batch_size=micro_batch_size, skip_bad_lines=skip_bad_lines,
    )  # fmt: skip
    size = sum(file.stat().st_size for file in out.glob("*.logits"))
    tokens = header.rows * header.settings.sequence_length
    print(f"{out}: {header.rows:,} rows, {tokens:,} tokens, {size / tokens:.1f} bytes a token")
    comes_next("distill", "STUDENT", "--teacher-cache", out, "--data", data, "--out", "DISTILLED")
