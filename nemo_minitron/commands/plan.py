"""Scores, or only an Architecture, and a budget or sizes -> what is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.artifacts.blocks import BLOCK_INFLUENCE
from nemo_minitron.artifacts.files import read_json
from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.artifacts.parse import anything, mapped
from nemo_minitron.errors import InputError
from nemo_minitron.search.sizes import Keep
from nemo_minitron.settings.search import Search

BASELINES = ("", "random", "least")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of `minitron plan`. `plan` is None without scores. `rows` are those of the candidates, best first;
    `uncut` is the row of the model itself. `combinations`: the number of shapes; `fitting`: those within the budget.
    `remark`: what keeps the student from being loaded somewhere, in one sentence."""

    plan: PrunePlan | None
    rows: Sequence[JsonObject] = ()
    uncut: JsonFields = dataclasses.field(default_factory=dict)
    combinations: int = 0
    fitting: int = 0
    remark: str = ""


def run_plan(
    scores: Path | None,
    keep: Keep,
    search: Search,
    *,
    architecture: Path | None = None,
    depth: str = BLOCK_INFLUENCE,
    contiguous: bool = True,
    baseline: str = "",
    seed: int = 0,
) -> Outcome:
    """`minitron plan`: if `search` has a target, the best shape that meets it and the runners-up; else the sizes of
    `keep`.

    `baseline`: keep `random` units (by `seed`) or the `least` important ones instead of the most important. Raises
    InputError, also for sizes that the model's Hugging Face class cannot have, if the scores know its config.
    """
    from nemo_minitron.families import remark_on, to_hf
    from nemo_minitron.search import plan, random_plan

    if (scores is None) == (architecture is None):
        raise InputError("give either scores or --architecture, a model's folder or JSON file")
    if baseline not in BASELINES:
        raise InputError(f"baseline '{baseline}' is unknown; legal are random and least")
    known = Scores.load(scores) if scores else None
    source, config = (known.architecture, known.notes.get("config")) if known else read_model(architecture or Path())
    outcome = Outcome(None)
    search = search.for_model(source)
    if search.wanted:
        outcome, keep = _searched(source, config, keep, search, known, depth, contiguous)
    elif not keep or known is None:
        raise InputError("there is nothing to plan; give a target, for example --params 84M, or scores and --keep")
    if known is None:
        return outcome
    if baseline == "random":
        chosen = random_plan(source, keep=keep, seed=seed)
    else:
        chosen = plan(known, keep=keep, least=baseline == "least", depth=depth, contiguous=contiguous)
    if config:
        to_hf(chosen.target, config, chosen.keep.get("layers"))
    if search.wanted:
        chosen.notes["budget"] = [str(target) for target in search.targets()]
    remark = (remark_on(chosen.target, config) or "") if config else ""
    return dataclasses.replace(outcome, plan=chosen, remark=uncut(chosen.target, source) or remark)


def uncut(target: Architecture, source: Architecture) -> str:
    """A sentence that says that nothing has to be cut; "" if the student is smaller than the model."""
    if target.as_dict() != source.as_dict():
        return ""
    return (
        f"nothing has to be cut: the model, with {source.parameters():,} parameters, is within the budget; "
        "give a smaller one, for example 0.7x"
    )


def _searched(
    source: Architecture, config: HfConfig | None, keep: Keep, search: Search,
    scores: Scores | None, depth: str, contiguous: bool,
) -> tuple[Outcome, Keep]:  # fmt: skip
    """(the candidates, the sizes of the best one). `config`: the model's Hugging Face config, if it is known."""
    from nemo_minitron.families import multiples_of
    from nemo_minitron.search.candidates import cut_of
    from nemo_minitron.search.table import rows_of, source_row

    loads = multiples_of(config) if config else None
    result = search.run(source, keep, scores, loads=loads, depth=depth, contiguous=contiguous)
    best = result.candidates[0]
    outcome = Outcome(
        None, rows_of(result, **search.serving), source_row(source, list(best.sizes), **search.serving),
        result.combinations, result.fitting,
    )  # fmt: skip
    return outcome, {**cut_of(best, source), **keep}  # `keep` may list the layers that stay


def read_model(path: Path) -> tuple[Architecture, JsonFields | None]:
    """(Architecture, Hugging Face config) of a model's folder or config.json. The config is None for the JSON file of
    an Architecture. Raises InputError."""
    from nemo_minitron.families import from_hf
    from nemo_minitron.sources.open import config_of

    if path.is_dir():
        config = config_of(path)
        return from_hf(config), config
    values = read_json(path, "the architecture", mapped(anything()))
    return (Architecture.from_dict(values), None) if "num_layers" in values else (from_hf(values), values)


def write_candidates(plan: Path, outcome: Outcome, cost: str) -> list[Path]:
    """Writes, beside the plan's file PLAN.json, `PLAN.candidates.csv`, and the figure `PLAN.pareto.svg` of the column
    `cost` with its CSV. Gives the files."""
    from nemo_minitron.export.plot import write_plot, write_rows
    from nemo_minitron.export.search_figures import pareto

    candidates, figure, numbers = files_beside(plan)
    write_rows(candidates, list(outcome.rows[0]), [list(row.values()) for row in outcome.rows])
    best = outcome.rows[0]["name"] if outcome.plan else ""
    write_plot(plan.parent, pareto(outcome.rows, cost, chosen=best), figure.stem)
    return [candidates, figure, numbers]


def files_beside(plan: Path) -> list[Path]:
    """The files of a search beside its plan: the candidates, their figure and the figure's numbers."""
    return [plan.with_name(f"{plan.stem}.{ending}") for ending in ("candidates.csv", "pareto.svg", "pareto.csv")]
