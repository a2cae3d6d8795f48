"""`minitron compress`: the whole job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def compress(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file.")],
    overrides: Annotated[Optional[list[str]], typer.Argument(help="key=value, e.g. distillation.tokens=2000")] = None,
    out: Annotated[Optional[Path], typer.Option("--out", help="The run folder [default: runs/NAME].")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and load nothing.")] = False,
    tp: Annotated[Optional[int], typer.Option("--tp", help="Tensor-parallel size; layout.tp of the recipe.")] = None,
    pp: Annotated[Optional[int], typer.Option("--pp", help="Pipeline stages; layout.pp.")] = None,
    vp: Annotated[Optional[int], typer.Option("--vp", help="Virtual stages a pipeline stage; layout.vp.")] = None,
    cp: Annotated[Optional[int], typer.Option("--cp", help="Context-parallel size; layout.cp.")] = None,
    ep: Annotated[Optional[int], typer.Option("--ep", help="Expert-parallel size; layout.ep.")] = None,
    dp: Annotated[Optional[int], typer.Option("--dp", help="Data-parallel size; layout.dp.")] = None,
    sp: Annotated[Optional[bool], typer.Option("--sp/--no-sp", help="Sequence parallelism; layout.sp.")] = None,
) -> None:
    """The whole job, resumable, into one run folder."""
    from nemo_minitron.job.chain import describe_chain
    from nemo_minitron.job.dry_run import describe
    from nemo_minitron.job.find import find
    from nemo_minitron.job.precision import settled

    layout = {"tp": tp, "pp": pp, "vp": vp, "cp": cp, "ep": ep, "dp": dp, "sp": sp}
    chosen = [f"layout.{name}={str(value).lower()}" for name, value in layout.items() if value is not None]
    job = find(recipe).override([*(overrides or []), *chosen])
    if dry_run:
        print(describe_chain(settled(job), out or Path("runs") / job.name) if job.chain else describe(settled(job)))
        return
    from nemo_minitron.job.commands.compress import run_compress

    run_compress(job, out)
