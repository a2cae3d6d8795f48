"""The tiles at the top of the report: size, quality, memory, speed, cost."""

from __future__ import annotations

import dataclasses

from nemo_minitron.artifacts.json_types import JsonFields
from nemo_minitron.export import formatting, result_figures
from nemo_minitron.export.formatting import CONTEXT
from nemo_minitron.export.run import RunFiles

SURE = 1.96  # standard errors on each side of a mean that hold 95 % of a normal distribution


@dataclasses.dataclass(frozen=True)
class Tile:
    """`what` it is about, its `value`, and what stands `beside` it."""

    what: str
    value: str
    beside: str


def tiles(run: RunFiles) -> list[Tile]:
    """The tiles that the run's files allow."""
    return [*_size(run), *_quality(run), *_memory(run), *_speed(run), *_cost(run)]


def _size(run: RunFiles) -> list[Tile]:
    if not run.plan:
        return []
    before, after = run.plan.source.parameters(), run.plan.target.parameters()
    beside = f"of {formatting.short_count(before)} ({formatting.change(before, after) or 'nothing cut'})"
    return [Tile("parameters", formatting.short_count(after), beside)]


def _quality(run: RunFiles) -> list[Tile]:
    """Perplexity of the last student on each text, beside the teacher's; and its agreement with the teacher."""
    made = []
    for corpus in dict.fromkeys(row["corpus"] for row in run.numbers):
        rows = {row["stage"]: row for row in result_figures.stages_of(run.numbers, corpus)}
        stage = next((name for name in ("distilled", "pruned") if name in rows), "")
        if not stage:
            continue
        row, beside = rows[stage], []
        if "teacher" in rows:
            beside.append(f"teacher {formatting.number(rows['teacher']['perplexity'], 1)}")
        if "gap" in row:
            beside.append(f"loss {row['gap']:+.3f}{_margin(row['gap_error'], '.3f')} nats".replace("-", "−"))
        what = f"perplexity, {stage}, {corpus}"
        made.append(Tile(what, formatting.number(row["perplexity"], 1), "; ".join(beside)))
        if "agreement" in row:
            made.append(_agreement(row))
    return made


def _agreement(row: JsonFields) -> Tile:
    error = row["agreement_error"]
    margin = _margin(None if error is None else 100 * error, ".1f")
    beside = f"of the likeliest next tokens are the same{',' * bool(margin)}{margin} points"
    return Tile("agreement with the teacher", f"{100 * row['agreement']:.1f} %", beside if margin else beside[:-7])


def _margin(error: float | None, digits: str) -> str:
    """The half-width of the interval of 95 %, as ` ± 0.012`; "" if it is not known."""
    return "" if error is None else f" ±\N{NO-BREAK SPACE}{SURE * error:{digits}}"


def _memory(run: RunFiles) -> list[Tile]:
    if not run.plan:
        return []
    before, after = (a.memory(batch=1, context=CONTEXT) for a in (run.plan.source, run.plan.target))
    beside = f"of {formatting.memory(before)}; weights and KV cache of {CONTEXT:,} tokens, bf16"
    return [Tile("memory", formatting.memory(after), beside)]


def _speed(run: RunFiles) -> list[Tile]:
    if not {"teacher", "distilled"} <= run.speed.keys():
        return []
    teacher, student = run.speed["teacher"], run.speed["distilled"]
    first, before = (formatting.seconds_of(row["latency"]) for row in (student, teacher))
    rate, rate_before = (f"{row['tokens_per_second']:,.1f}" for row in (student, teacher))
    where = f"{student['device']}, {student['precision']}, transformers"
    prompt = f"prompt of {student['prompt']:,} tokens"
    return [
        Tile("time to the first token", first, f"teacher {before}; {prompt}, {where}"),
        Tile("tokens a second", rate, f"teacher {rate_before}; one sequence, {where}"),
    ]


def _cost(run: RunFiles) -> list[Tile]:
    """Time of all finished stages, and the tokens that the student learned."""
    if run.manifest is None or not run.manifest.stages:
        return []
    took = sum(stage["seconds"] for stage in run.manifest.stages)
    layout = (run.recipe or {}).get("layout")
    processes = 1
    for axis in ("tp", "pp", "cp", "dp"):
        size = layout.get(axis) if isinstance(layout, dict) else 1
        processes *= size if isinstance(size, int) else 1
    learned = f"; {formatting.count(run.curve[-1]['tokens'])} tokens learned" if run.curve else ""
    beside = f"on {processes} process{'es' * (processes > 1)}{learned}"
    return [Tile("cost of the run", formatting.seconds(took), beside)]
