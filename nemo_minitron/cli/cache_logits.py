"""`minitron cache-logits`: a teacher's logits, once, for many students."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from nemo_minitron.cli.options import Cp, Data, Dp, Ep, Length, Pp, Precision, Seed, SkipBadLines, Sp, Stall, Tp, Vp
from nemo_minitron.launch.stall import SECONDS


def cache_logits(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id or NeMo checkpoint of the teacher.")],
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="The cache's folder.")],
    sequence_length: Length = 512,
    samples: Annotated[Optional[int], typer.Option("--samples", help="Rows of the text; all unless given.")] = None,
    mode: Annotated[str, typer.Option("--mode", help="sample (unbiased), or top-k and the rest's mass.")] = "sample",
    draws: Annotated[int, typer.Option("--draws", help="Of --mode sample: tokens drawn at each position.")] = 50,
    independent: Annotated[
        bool, typer.Option("--independent", help="Draw as RS-KD does, not one from each part of the distribution.")
    ] = False,
    proposal_temperature: Annotated[
        float, typer.Option("--proposal-temperature", help="Draw from p^(1/T); another than 1 takes 4 bytes more.")
    ] = 1.0,
    sets: Annotated[int, typer.Option("--sets", help="Sets of draws; epoch e of a training uses set e mod SETS.")] = 1,
    k: Annotated[int, typer.Option("--k", help="Of --mode top-k: tokens kept at each position.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="Of the distillation loss.")] = 1.0,
    rows_per_shard: Annotated[int, typer.Option("--rows-per-shard", help="What a kill can cost, at most.")] = 256,
    micro_batch_size: Annotated[int, typer.Option("--micro-batch-size")] = 1,
    precision: Precision = "bf16",
    tp: Tp = 1,
    pp: Pp = 1,
    vp: Vp = 1,
    cp: Cp = 1,
    ep: Ep = 1,
    dp: Dp = 1,
    sp: Sp = False,
    skip_bad_lines: SkipBadLines = False,
    seed: Seed = 1234,
    stall_timeout: Stall = SECONDS,
) -> None:
    """Keep a few tokens of the teacher's distribution at each position; run again after a kill, it goes on."""
    from nemo_minitron.artifacts.logit_records import CacheSettings
    from nemo_minitron.commands.cache import run_cache
    from nemo_minitron.job import Layout
    from nemo_minitron.settings.precision import resolve_precision

    settings = CacheSettings(
        sequence_length=sequence_length, mode=mode, draws=draws, independent=independent, k=k, sets=sets, seed=seed,
        proposal_temperature=proposal_temperature, temperature=temperature, precision=resolve_precision(precision),
    )  # fmt: skip
    header = run_cache(
        model, data, out, settings, Layout(tp=tp, pp=pp, vp=vp, cp=cp, ep=ep, dp=dp, sp=sp), samples=samples,
        rows_per_shard=rows_per_shard, micro_batch_size=micro_batch_size, skip_bad_lines=skip_bad_lines,
    )  # fmt: skip
    size = sum(file.stat().st_size for file in out.glob("*.logits"))
    tokens = header.rows * sequence_length
    print(f"{out}: {header.rows:,} rows, {tokens:,} tokens, {size / tokens:.1f} bytes a token")
