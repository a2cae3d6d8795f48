"""`minitron plan`: scores and a budget, or scores and sizes -> a plan of what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from nemo_minitron.artifacts.blocks import BLOCK_INFLUENCE
from nemo_minitron.artifacts.json_types import JsonFields
from nemo_minitron.cli.closing import comes_next
from nemo_minitron.cli.options import Overwrite, Taking
from nemo_minitron.schema import METHOD, MODEL, OUTPUT
from nemo_minitron.settings.search import Search

if TYPE_CHECKING:
    from nemo_minitron.commands.plan import Outcome

KEEP = (
    "Sizes to keep, e.g. ffn=1024,layers=24, or the layers that stay: layers=0+1+3-7. Beside a target: axes that are "
    "held fixed."
)
DEPTH = "Criterion that chooses which layers are dropped: block_influence, or a depth criterion of the scores."
CONTIGUOUS = "Drop layers as one block, if --depth scored blocks."
ARCHITECTURE = "Folder or JSON file of a model, instead of scores; it only lists candidates."
OUT = "File of the plan. For plan.json a search writes plan.candidates.csv and plan.pareto.svg beside it."
BASELINE = "Baseline to plan instead: random units, or the least important ones (least)."
WIDE = 140
NOT_SHOWN = ("name", "rank", "near_first", "front")
NEAR = (
    "~: {} other {} within the noise of this ranking, which guesses the loss's rise to 15 %;\n"
    "minitron compress with the same budget cuts and measures the best shapes"
)
COLUMNS = {  # column -> heading, the unit that its numbers are divided by, format
    "parameters": ("params M", 1e6, "{:,.1f}"), "without_embeddings": ("no emb. M", 1e6, "{:,.1f}"),
    "active_parameters": ("active M", 1e6, "{:,.1f}"), "bytes": ("GB", 1e9, "{:,.3f}"),
    "flops": ("GFLOP", 1e9, "{:,.3f}"), "kept": ("kept", 1, "{:.3f}"),
}  # fmt: skip


def plan(
    scores: Annotated[Optional[Path], typer.Argument(help="File of scores of `minitron estimate`.")] = None,
    *,
    keep: Annotated[str, typer.Option(help=KEEP, rich_help_panel=METHOD)] = "",
    search: Annotated[Search, Taking(distil=1)],  # search.distil must not exceed --top, which may be 1
    depth: Annotated[str, typer.Option(help=DEPTH, rich_help_panel=METHOD)] = BLOCK_INFLUENCE,
    contiguous: Annotated[bool, typer.Option(help=CONTIGUOUS, rich_help_panel=METHOD)] = True,
    baseline: Annotated[str, typer.Option(help=BASELINE, rich_help_panel=METHOD)] = "",
    seed: Annotated[int, typer.Option(help="The seed of --baseline random.", rich_help_panel=METHOD)] = 0,
    architecture: Annotated[Optional[Path], typer.Option(help=ARCHITECTURE, rich_help_panel=MODEL)] = None,
    out: Annotated[Path, typer.Option("--out", help=OUT, rich_help_panel=OUTPUT)] = Path("plan.json"),
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the candidates, and write nothing.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Choose what is kept: the best shape within a budget, or given sizes.

    minitron plan scores.safetensors --params 0.7x

    minitron plan scores.safetensors --keep ffn=1024,layers=24 --out plan.json
    """
    from nemo_minitron.commands.place import check_file
    from nemo_minitron.commands.plan import files_beside, run_plan, write_candidates
    from nemo_minitron.search import parse

    check_file(out, overwrite or dry_run or architecture is not None)
    for file in files_beside(out) if search.wanted else ():
        check_file(file, overwrite or dry_run)
    outcome = run_plan(
        scores, parse.sizes(keep), search, architecture=architecture, depth=depth, contiguous=contiguous,
        baseline=baseline, seed=seed,
    )  # fmt: skip
    if outcome.rows:
        _show(outcome)
    if dry_run:
        print("nothing was written")
        if architecture is None:
            print("next: the same command without --dry-run")
        return
    if outcome.rows:
        print("written: " + ", ".join(map(str, write_candidates(out, outcome, search.cost))))
    if outcome.plan:
        outcome.plan.save(out)
        before, after = outcome.plan.source, outcome.plan.target
        print(f"{out}: {before.parameters():,} -> {after.parameters():,} parameters")
    if outcome.remark:
        print(f"remark: {outcome.remark}")
    if outcome.plan:
        comes_next("prune", "MODEL", out, "STUDENT")


def _show(outcome: Outcome) -> None:
    """Prints one table: the candidates, then the uncut model."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    ranked = [row for row in outcome.rows if row["rank"] is not None]
    names = [name for name in ranked[0] if name not in NOT_SHOWN and ranked[0][name] is not None]
    level = [row for row in ranked[1:] if row["near_first"]]
    title = f"{outcome.combinations:,} shapes, {outcome.fitting:,} within the budget, {len(ranked)} shown"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in ("", *(COLUMNS.get(name, (name,))[0] for name in names)):
        table.add_column(name, justify="right", no_wrap=True)
    for row in ranked:
        table.add_row(f"{row['rank']} ~" if row in level else f"{row['rank']}  ", *_cells(row, names))
    table.add_section()
    table.add_row("uncut", *_cells(outcome.uncut, names))
    console = Console()
    console.width = console.width if console.is_terminal else WIDE  # a file has no width of its own
    console.print(table)
    if level:
        print(NEAR.format(len(level), "shapes are" if len(level) > 1 else "shape is"))


def _cells(row: JsonFields, names: list[str]) -> list[str]:
    shown = ((row[name], *COLUMNS.get(name, (name, 1, "{:,.0f}"))) for name in names)
    return [text.format(value / unit) for value, _, unit, text in shown]
