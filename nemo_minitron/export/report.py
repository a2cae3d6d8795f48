"""report.html of a run folder, one file that opens without a network, and figures/ with the data behind each figure."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from nemo_minitron.artifacts.files import atomic_file
from nemo_minitron.artifacts.json_types import JsonFields
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.export import formatting, importance_figures, result_figures, search_figures, trajectory_figures
from nemo_minitron.export.gate_rows import gate_note, gate_rows
from nemo_minitron.export.plot import NARROW, Plot, in_page, svg, write_plot
from nemo_minitron.export.run import RunFiles, read_run
from nemo_minitron.export.tiles import tiles

TEMPLATE = "report.html.jinja"
FIGURES: dict[str, tuple[str, Callable[[RunFiles], Plot | str]]] = {
    "layers": ("Layers", importance_figures.layers),
    "depth": ("Dropped layers", importance_figures.depth),
    "ffn": ("Neurons of the FFN", importance_figures.neurons),
    "hidden": ("Hidden channels", importance_figures.hidden),
    "heads": ("Attention heads", importance_figures.heads),
    "query_groups": ("Query groups", importance_figures.query_groups),
    "pareto": ("Shapes of the search", lambda run: search_figures.of_run(run, "pareto")),
    "ranks": ("Ranks of brief distillation", lambda run: search_figures.of_run(run, "ranks")),
    "distillation": ("Distillation", result_figures.distillation),
    "trajectory": ("Held-out loss along the distillation", trajectory_figures.trajectory),
    "perplexity": ("Perplexity", result_figures.perplexity),
}


def write_report(run_folder: str | Path) -> Path:
    """Writes RUN/report.html and RUN/figures/*.svg, *.csv from the files of the run folder alone; returns the report's
    path.

    A part that the run has not made yet is replaced by a line that says so. The same folder gives the same bytes.
    Raises InputError if the folder is no run folder, or has damaged files.
    """
    run = read_run(run_folder)
    context = {
        "title": _title(run),
        "recipe_name": str((run.recipe or {}).get("name", "")),
        "folder": run.folder.resolve().name,
        "tiles": tiles(run),
        "sizes": formatting.size_rows(run.plan.source, run.plan.target) if run.plan else [],
        "figures": {name: _figure(run, name) for name in FIGURES},
        "numbers": _numbers(run),
        "benchmarks": _benchmarks(run),
        "along": trajectory_figures.task_rows(run),
        "samples": _samples(run),
        "calibration": _calibration(run),
        "gates": gate_rows(run.gates),
        "gates_note": gate_note(run.gates),
        "stages": _stages(run),
        "facts": _facts(run),
        "recipe": None if run.recipe is None else json.dumps(run.recipe, indent=2, ensure_ascii=False),
    }
    with atomic_file(RunFolder(run.folder).report) as temporary:
        temporary.write_text(_render(context), encoding="utf-8")
    return RunFolder(run.folder).report


def _render(context: Mapping[str, object]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(context)


def _figure(run: RunFiles, name: str) -> dict[str, object]:
    """Writes a figure's files; if it cannot be made, removes those of an earlier report."""
    from markupsafe import Markup

    title, make = FIGURES[name]
    plot, folder = make(run), RunFolder(run.folder).figures
    if isinstance(plot, str):
        for kind in ("svg", "csv"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
        return {"title": title, "missing": plot}
    # matplotlib escapes what it draws, so its SVG may go into the page as it is.
    wide, narrow = (Markup(in_page(drawing)) for drawing in (write_plot(folder, plot), svg(plot, NARROW)))
    data = base64.b64encode((folder / f"{name}.csv").read_bytes()).decode()
    return {"title": title, "wide": wide, "narrow": narrow, "caption": plot.caption, "csv": f"{name}.csv", "data": data}


def _title(run: RunFiles) -> str:
    """The model, and its sizes before and after, as far as they are known."""
    recipe = run.recipe or {}
    model = str(recipe.get("base_model") or Path(str(recipe.get("teacher") or "")).name or run.folder.resolve().name)
    model = model.rpartition("/")[2]  # without the owner of a hub id
    if run.plan is None:
        return model
    sizes = (formatting.short_count(a.parameters()) for a in (run.plan.source, run.plan.target))
    before, after = (size.replace(" ", "\N{NO-BREAK SPACE}") for size in sizes)
    return f"{model}: {before} → {after}"


def _benchmarks(run: RunFiles) -> list[list[str]]:
    """(task, metric, teacher, student) of lm-eval, with standard errors where it gives them."""
    teacher, student = (run.benchmarks.get(name, {}) for name in ("teacher", "distilled"))
    rows = []
    for task, metrics in student.items():
        for metric in metrics:
            if "_stderr" in metric or "," not in metric:
                continue
            error = metric.replace(",", "_stderr,")
            sides = [_score(side.get(task, {}), metric, error) for side in (teacher, student)]
            rows.append([task, metric.partition(",")[0], *sides])
    return rows


def _score(row: JsonFields, metric: str, error: str) -> str:
    if metric not in row:
        return formatting.NONE
    return formatting.number(row[metric]) + (f" ± {row[error]:.3f}" if error in row else "")


def _numbers(run: RunFiles) -> list[list[str]]:
    return [
        [
            formatting.STAGES.get(row["stage"], str(row["stage"])),
            str(row["corpus"]),
            *formatting.result_cells(row),
            formatting.seconds(row["seconds"]),
        ]
        for corpus in dict.fromkeys(row["corpus"] for row in run.numbers)
        for row in result_figures.stages_of(run.numbers, corpus)
    ]


def _samples(run: RunFiles) -> list[dict[str, object]]:
    """[{"prompt", "texts": [(stage, text)]}], prompts in the order of the file, teacher first."""
    samples = []
    for prompt in dict.fromkeys(row["prompt"] for row in run.samples):
        rows = sorted(
            (r for r in run.samples if r["prompt"] == prompt), key=lambda r: formatting.stage_order(r["stage"])
        )
        texts = [(formatting.STAGES.get(row["stage"], row["stage"]), row["text"]) for row in rows]
        samples.append({"prompt": prompt, "texts": texts})
    return samples


def _calibration(run: RunFiles) -> str:
    if run.scores is None:
        return "The run has no scores yet."
    scores = run.scores
    return (
        f"Scored by forward passes over {formatting.count(scores.samples)} samples "
        f"({formatting.count(scores.tokens)} tokens); criterion {scores.criterion}."
    )


def _stages(run: RunFiles) -> list[tuple[str, str]]:
    stages = run.manifest.stages if run.manifest else []
    rows = [(str(stage["name"]), formatting.seconds(stage["seconds"])) for stage in stages]
    total = ("together", formatting.seconds(sum(stage["seconds"] for stage in stages)))
    return [*rows, total] if rows else []


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    """Versions and digests."""
    manifest = run.manifest
    versions = sorted((manifest.versions if manifest else {}).items())
    digests = [(f"digest of {name}", value) for name, value in sorted((manifest.digests if manifest else {}).items())]
    plan = [("digest of plan", run.plan.digest)] if run.plan else []
    return [*versions, *digests, *(row for row in plan if row not in digests)]
