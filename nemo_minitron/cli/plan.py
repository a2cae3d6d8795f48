"""`minitron plan`: scores and a budget, or sizes -> what stays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from nemo_minitron.commands.plan import Outcome

KEEP = "Sizes to keep, e.g. ffn=1024,hidden=432,layers=24; beside a target: axes to hold fixed."
BOUNDS = "Least and largest size of an axis, e.g. ffn=512:1536,layers=20:30 [default: half to all]."
SPACE = "Sizes to try, e.g. 'layers=29,30;heads=32,48;ffn=2.5x,3x' (multiples of hidden)."
DIVISORS = "What sizes must be multiples of: 64, fp8 (16 on a rank), fp8=128, tp=8, hidden=128, or several with commas."
DEPTH = "Criterion by which layers go: block_influence, or one of the scores' depth criteria."
BAND = "%s within --tolerance, e.g. 84M or 8.27B."
WIDE = 140
COLUMNS = {  # of a row -> head, what a number is divided by, how it reads
    "parameters": ("params M", 1e6, "{:,.1f}"), "without_embeddings": ("no emb. M", 1e6, "{:,.1f}"),
    "active_parameters": ("active M", 1e6, "{:,.1f}"), "bytes": ("GB", 1e9, "{:,.3f}"),
    "flops": ("GFLOP", 1e9, "{:,.3f}"), "kept": ("kept", 1, "{:.3f}"),
}  # fmt: skip


def plan(
    scores: Annotated[Optional[Path], typer.Argument(help="Scores of `minitron estimate`.")] = None,
    keep: Annotated[str, typer.Option("--keep", help=KEEP)] = "",
    params: Annotated[str, typer.Option("--params", help=BAND % "Parameters")] = "",
    params_no_embeddings: Annotated[str, typer.Option(help=BAND % "Parameters without embeddings")] = "",
    active_params: Annotated[str, typer.Option(help=BAND % "Parameters active for a token")] = "",
    memory: Annotated[str, typer.Option("--memory", help="At most, weights and KV cache, e.g. 8GiB.")] = "",
    flops: Annotated[str, typer.Option("--flops", help="At most, forward, of a token at --context, e.g. 150M.")] = "",
    batch: Annotated[int, typer.Option("--batch", help="Sequences in the KV cache.")] = 1,
    context: Annotated[int, typer.Option("--context", help="Tokens of each.")] = 4096,
    weights: Annotated[str, typer.Option("--weights", help="bf16 or fp8.")] = "bf16",
    kv_cache: Annotated[str, typer.Option("--kv-cache", help="bf16 or fp8.")] = "bf16",
    tolerance: Annotated[str, typer.Option("--tolerance", help="Of the targets in parameters.")] = "5%",
    bounds: Annotated[str, typer.Option("--bounds", help=BOUNDS)] = "",
    space: Annotated[str, typer.Option("--space", help=SPACE)] = "",
    divisors: Annotated[str, typer.Option("--divisors", help=DIVISORS)] = "",
    depth: Annotated[str, typer.Option("--depth", help=DEPTH)] = "block_influence",
    contiguous: Annotated[bool, typer.Option(help="Layers go as one block, where --depth scanned blocks.")] = True,
    top: Annotated[int, typer.Option("--top", help="Candidates to list.")] = 20,
    maximal: Annotated[bool, typer.Option("--maximal", help="Leave out shapes that fit inside another.")] = False,
    architecture: Annotated[Optional[Path], typer.Option(help="A model's folder or JSON, instead of scores.")] = None,
    out: Annotated[Path, typer.Option("--out", help="candidates.csv and pareto.svg go beside it.")] = Path("plan.json"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the candidates, and write nothing.")] = False,
    baseline: Annotated[str, typer.Option("--baseline", help="random or least: what the scores would not keep.")] = "",
    seed: Annotated[int, typer.Option("--seed", help="Of --baseline random.")] = 0,
) -> None:
    """Choose what stays: the best shape within a budget, or given sizes."""
    from nemo_minitron.commands.plan import run_plan, write_candidates
    from nemo_minitron.search import parse
    from nemo_minitron.settings.search import Search

    search = Search(
        params=params, params_no_embeddings=params_no_embeddings, active_params=active_params, memory=memory,
        flops=flops, batch=batch, context=context, weights=weights, kv_cache=kv_cache, tolerance=tolerance,
        bounds=bounds, space=space, divisors=divisors, maximal=maximal, candidates=top, distil=1,
    )  # fmt: skip
    outcome = run_plan(
        scores, parse.sizes(keep), search, architecture=architecture, depth=depth, contiguous=contiguous,
        baseline=baseline, seed=seed,
    )  # fmt: skip
    if outcome.rows:
        _show(outcome)
    if dry_run:
        print("nothing was written")
        return
    if outcome.rows:
        print("written: " + ", ".join(map(str, write_candidates(out.parent, outcome, search.cost))))
    if outcome.plan:
        outcome.plan.save(out)
        made = outcome.plan
        print(f"{out}: {made.source.parameters():,} -> {made.target.parameters():,} parameters")
    if outcome.remark:
        print(f"remark: {outcome.remark}")


def _show(outcome: Outcome) -> None:
    """One table, the uncut model last; the columns of a shape first."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    ranked = [row for row in outcome.rows if row["rank"] is not None]
    names = [name for name in ranked[0] if name not in ("name", "rank", "front") and ranked[0][name] is not None]
    title = f"{outcome.combinations:,} shapes, {outcome.fitting:,} within the budget, {len(ranked)} shown"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in ("", *(COLUMNS.get(name, (name,))[0] for name in names)):
        table.add_column(name, justify="right", no_wrap=True)
    for row in ranked:
        table.add_row(str(row["rank"]), *_cells(row, names))
    table.add_section()
    table.add_row("uncut", *_cells(outcome.uncut, names))
    console = Console()
    console.width = console.width if console.is_terminal else WIDE  # a file has no edge
    console.print(table)


def _cells(row: Mapping[str, Any], names: list[str]) -> list[str]:
    shown = ((row[name], *COLUMNS.get(name, (name, 1, "{:,.0f}"))) for name in names)
    return [text.format(value / unit) for value, _, unit, text in shown]
