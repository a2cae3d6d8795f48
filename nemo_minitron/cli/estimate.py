"""`minitron estimate`: a model and text -> scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from nemo_minitron.cli.nodes import Count, Meeting, Rank, on_nodes
from nemo_minitron.cli.options import (
    Cp,
    Data,
    Dp,
    Ep,
    Etp,
    Length,
    Pp,
    Precision,
    Seed,
    SkipBadLines,
    Sp,
    Stall,
    Tp,
    Vp,
)
from nemo_minitron.launch.stall import SECONDS

CRITERION = "batch,sequence: mean, l2, var or max; several with a semicolon between them, or the option repeated"
AXES = "Axes with commas: ffn, heads, query_groups, hidden, experts, layers ...; all unless given."
METHOD = "By what units are scored: activation, taylor (times gradients), magnitude (of weights) or random."
DEPTH = "Criteria of depth with commas: loss, perplexity, accuracy (with --items), removal (with --remove)."
SIZES = "Sizes of the contiguous blocks that are left out, with commas."
MERGE = "Scores of another run over other rows of the same model, to merge in."


def estimate(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id or NeMo checkpoint.")],
    data: Data,
    out: Annotated[Path, typer.Option("--out")] = Path("scores.safetensors"),
    samples: Annotated[int, typer.Option("--samples", help="Rows of the corpus.")] = 1024,
    sequence_length: Length = 512,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows of a micro-batch.")] = 1,
    criterion: Annotated[Optional[list[str]], typer.Option(help=f"{CRITERION}; l2,mean unless given.")] = None,
    axes: Annotated[str, typer.Option("--axes", help=AXES)] = "",
    method: Annotated[str, typer.Option("--method", help=METHOD)] = "activation",
    norms: Annotated[str, typer.Option("--norms", help="all or layers: which norms `hidden` sums.")] = "all",
    depth: Annotated[str, typer.Option("--depth", help=DEPTH)] = "",
    depth_sizes: Annotated[str, typer.Option("--depth-sizes", help=SIZES)] = "1",
    depth_samples: Annotated[int, typer.Option("--depth-samples", help="Rows for loss and removal.")] = 16,
    items: Annotated[str, typer.Option("--items", help="JSONL of context, choices, answer.")] = "",
    remove: Annotated[int, typer.Option("--remove", help="How many layers removal takes.")] = 0,
    merge: Annotated[Optional[Path], typer.Option("--merge", help=MERGE)] = None,
    save_every: Annotated[int, typer.Option("--save-every", help="Rows between saves, for a run that is killed.")] = 64,
    precision: Precision = "fp32",
    tp: Tp = 1,
    pp: Pp = 1,
    vp: Vp = 1,
    cp: Cp = 1,
    ep: Ep = 1,
    etp: Etp = 0,
    dp: Dp = 1,
    sp: Sp = False,
    skip_bad_lines: SkipBadLines = False,
    seed: Seed = 1234,
    nodes: Count = None,
    node_rank: Rank = None,
    rendezvous: Meeting = None,
    stall_timeout: Stall = SECONDS,
) -> None:
    """Score what matters, with forward passes only; run again after a kill, it goes on."""
    from nemo_minitron.commands.estimate import describe_scores, run_estimate
    from nemo_minitron.job import Calibration, Layout
    from nemo_minitron.settings.precision import resolve_precision

    calibration = Calibration(
        samples, sequence_length, batch_size, ";".join(criterion or ["l2,mean"]), norms,
        resolve_precision(precision), seed,
        axes=tuple(_names(axes)), save_every=save_every, depth=tuple(_names(depth)), depth_sizes=_numbers(depth_sizes),
        depth_samples=depth_samples, items=items, remove=remove,
        method=method,
    )  # fmt: skip
    layout = Layout(tp=tp, pp=pp, vp=vp, cp=cp, ep=ep, etp=etp, dp=dp, sp=sp)

    def command() -> None:
        scores = run_estimate(model, data, out, calibration, layout, merge, skip_bad_lines)
        print(f"{out}: {scores.samples} samples, {scores.tokens:,} tokens, criterion {scores.criterion}")
        for line in describe_scores(scores):
            print(f"  {line}")

    job = ["estimate", model, data, vars(calibration), vars(layout), str(merge)]
    on_nodes((nodes, node_rank, rendezvous), layout, job, out, command)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> tuple[int, ...]:
    from nemo_minitron.errors import InputError

    names = _names(text)
    for name in names:
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise InputError(f"'{name}' in --depth-sizes is no size; write whole numbers, for example 1,2,6")
    return tuple(map(int, names))
