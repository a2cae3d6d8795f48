"""The stage of a search that measures cuts along one axis each; the rises of their losses rank the shapes.

Each cut is a candidate's folder, `search/AXISsize`: it is cut, re-fitted and measured as candidates are.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import PrunePlan, Scores, records
from nemo_minitron.artifacts.files import read_json, write_json
from nemo_minitron.artifacts.json_types import HfConfig
from nemo_minitron.artifacts.run_folder import CandidateFolder, RunFolder
from nemo_minitron.commands.evaluate import measure
from nemo_minitron.errors import InputError
from nemo_minitron.families import multiples_of, to_hf
from nemo_minitron.job.run import Run, Stage
from nemo_minitron.job.stages import corpora
from nemo_minitron.job.stages.candidate import evaluation_of, loss_of
from nemo_minitron.job.stages.compensate import solve_cuts, solves
from nemo_minitron.job.teacher import teacher_folder
from nemo_minitron.search.marginals import Marginals, points_of
from nemo_minitron.search.varied import length
from nemo_minitron.sources.open import config_of


def measure_axes(run: Run) -> None:
    """The stage: cuts the teacher along one axis at a time, at a few sizes, and measures each cut."""
    from nemo_minitron.data import Tokens
    from nemo_minitron.search import plan

    job, scores = run.job, Scores.load(run.folder.scores)
    config = config_of(job.teacher)
    space = job.search.shapes(scores.architecture, job.keep, multiples_of(config))
    names = []
    for name in space.axes:
        points = points_of(space, name, job.search.marginals)
        made = {size: plan(scores, {name: size}, depth=job.depth) for size in points}
        for size, cut in _loaded(name, made, config).items():
            names.append((name, size))
            cut.save(run.folder.candidate(f"{name}{size}").plan)
    if solves(job):
        solve_cuts(run, [run.folder.candidate(f"{name}{size}") for name, size in names])
    uncut = measure(teacher_folder(run), Tokens(corpora.prefix(run, "test")), evaluation_of(run))["loss"]
    run.say(f"    {'uncut':40} loss {uncut:.4f}")
    rows = [{"axis": name, "size": size, "loss": _loss(run, f"{name}{size}")} for name, size in names]
    write_json(run.folder.marginals, {"uncut": uncut, "cuts": rows})


def _loaded(name: str, plans: Mapping[int, PrunePlan], config: HfConfig) -> dict[int, PrunePlan]:
    """Of the plans by size of an axis, those whose students transformers loads although no other axis is cut.

    Raises InputError if there are plans, and none of them is one.
    """
    alone = {size: made for size, made in plans.items() if _loads(made.target, config)}
    if plans and not alone:
        raise InputError(
            f"the model cannot be cut along '{name}' alone, so no loss can be measured; set search.proxy to 'scores'"
        )
    return alone


def _loads(architecture: Architecture, config: HfConfig) -> bool:
    try:
        to_hf(architecture, config)
    except InputError:
        return False
    return True


def _loss(run: Run, name: str) -> float:
    """The loss of a cut, whose student is not needed any more."""
    loss = loss_of(run, name)
    run.say(f"    {name:40} loss {loss:.4f}")
    shutil.rmtree(run.folder.candidate(name).student, ignore_errors=True)
    return loss


def marginals_of(run: Run) -> Marginals:
    """What the stage measured. Raises InputError if it is missing or damaged."""
    found = read_json(run.folder.marginals, "the losses of single axes", records.MARGINALS)
    source = Scores.load(run.folder.scores).architecture
    losses: dict[str, dict[int, float]] = {}
    for row in found["cuts"]:
        losses.setdefault(row["axis"], {})[row["size"]] = row["loss"]
    lengths = {name: length(source, name) for name in losses}
    return Marginals(found["uncut"], losses, lengths, source.num_query_groups)


def _inputs(run: Run) -> object:
    search = run.job.search
    space = [search.space, search.bounds, search.divisors, search.marginals, dict(run.job.keep), run.job.depth]
    return [space, evaluation_of(run).deciding(), run.job.cutting.deciding()]


def _left(run: Run) -> list[str]:
    rows = read_json(run.folder.marginals, "the losses of single axes", records.MARGINALS)["cuts"]
    return [f"{RunFolder.search}/{row['axis']}{row['size']}/{CandidateFolder.numbers}" for row in rows]


MARGINALS = Stage("marginals", measure_axes, _inputs, ("data", "estimate"), (RunFolder.marginals,), _left)
