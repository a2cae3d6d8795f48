"""`minitron plan`: scores -> what stays."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan(
    scores: Annotated[Path, typer.Argument(help="Scores of `minitron estimate`.")],
    keep: Annotated[str, typer.Option("--keep", help="Sizes to keep, e.g. ffn=1024,hidden=448,layers=24")],
    out: Annotated[Path, typer.Option("--out")] = Path("plan.json"),
    baseline: Annotated[str, typer.Option("--baseline", help="random or least: what the scores would not keep.")] = "",
    seed: Annotated[int, typer.Option("--seed", help="Of --baseline random.")] = 0,
) -> None:
    """Choose what stays."""
    from nemo_minitron.job.commands.plan import run_plan

    made = run_plan(scores, keep, baseline, seed)
    made.save(out)
    print(f"{out}: {made.source.parameters():,} -> {made.target.parameters():,} parameters")
