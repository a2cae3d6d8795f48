"""The facts of a run that the student's model card shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.artifacts.files import read_json
from nemo_minitron.artifacts.parse import grouped, listed, mapped, number, text, whole
from nemo_minitron.artifacts.records import NAME, read_numbers
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.export import CardFacts, write_card_figures
from nemo_minitron.export.folder import dtype_of, has_chat_template
from nemo_minitron.export.run import read_run
from nemo_minitron.families import family_of, read_config, remark_on, resolve
from nemo_minitron.job.lineage import learned_from
from nemo_minitron.job.run import Run
from nemo_minitron.mixture import expert_of
from nemo_minitron.pruning.compensation import follows_a_cut
from nemo_minitron.pruning.cut import COMPENSATION
from nemo_minitron.pruning.defaults import AUTO
from nemo_minitron.pruning.reconstruction import SHARES

CUT = grouped(
    {"tensors": listed(text())},
    {
        "samples": whole(),
        "sequence_length": whole(),
        "merged experts": mapped(mapped(listed(whole()))),
        "filled gaps": listed(text()),
        "scaled behind dropped layers": mapped(number()),
        "reconstruct": whole(),
        SHARES: mapped(number()),
    },
)
ROTATED = "hidden channels are principal axes of the base's residual stream"
CHAIN = grouped({"name": NAME}, {"chain": listed(grouped({"name": NAME}))})


def card_facts(run: Run) -> CardFacts:
    """The facts of a run's card, read from the run folder. The base of a chain's student is the model that it learns
    from.

    Raises InputError for damaged files.
    """
    job, settings = run.job, run.job.distillation
    last, scores = PrunePlan.load(run.folder.plan), Scores.load(run.folder.scores)
    plan = PrunePlan.load(run.folder.composed) if job.lineage else last
    base = resolve(learned_from(job))
    between = f"It was cut from a student of {last.source.parameters():,} parameters, the teacher in the numbers above."
    data = {"name": job.data.name, "license": job.data.licence}
    use = f"calibration and {'prompts, which the teacher continued' if job.generation.wanted else 'distillation'}"
    sentence = remark_on(plan.target, read_config(run.folder.pruned))
    return CardFacts(
        name=job.name,
        base_model=job.base_model or base.name,
        source=plan.source,
        target=plan.target,
        criterion=scores.criterion + (f", layers by {plan.notes['depth']}" if "depth" in plan.notes else ""),
        samples=scores.samples,
        tokens=scores.tokens,
        plan_digest=plan.digest,
        command=f"minitron compress {_recipe(run)}",
        base_note=job.base_note,
        dtype=dtype_of(run.folder.student),
        chats=has_chat_template(run.folder.student),
        figures=write_card_figures(run.folder.student, read_run(run.folder.path)),
        license=job.licence,
        base_folder=base,
        data=[data | {"use": use}, data | {"use": "evaluation (held-out articles)"}],
        distillation={
            "loss": settings.loss,
            "tokens": settings.steps * settings.sequence_length * settings.global_batch_size,
            "steps": settings.steps,
            "precision": settings.precision,
            "learning_rate": settings.learning_rate,
        },
        numbers=read_numbers(run.folder.numbers),
        versions=run.manifest.versions,
        limits=[*([between] if job.learns_from else []), *([sentence] if sentence else []), *larger_files(base)],
        in_place=_in_place(run),
    )


def larger_files(base: Path) -> list[str]:
    """One sentence if the base's folder stores four bits a weight, which no student does."""
    config = read_config(base) if (base / "config.json").is_file() else {}
    if not config or not family_of(config).packed(config):
        return []
    return ["The base is published in MXFP4; this model is stored in bf16, so its files may be larger than the base's."]


def _in_place(run: Run) -> str:
    """What the pruned student has besides slices of its teacher, in words; "" if it has nothing."""
    record, rotated = run.folder.pruned / COMPENSATION, [ROTATED] if run.job.cutting.rotate else []
    if not record.is_file():
        return "; ".join(rotated)
    notes = read_json(record, "the record of the cut", CUT)
    return "; ".join([*rotated, *_fitted(notes), *_scaled(notes), *_merged(notes)])


def _fitted(notes: dict[str, Any]) -> Iterator[str]:
    """What was fitted to activations of the calibration."""
    filled = notes.get("filled gaps", [])
    merged = notes.get("merged experts", {})  # no expert's matrix is re-fitted beside them
    refitted = [n for n in notes["tensors"] if follows_a_cut(n) and not (merged and expert_of(n) >= 0)]
    refitted = [name for name in refitted if name not in filled]
    if {"ridge", "samples", "sequence_length"} <= notes.keys():
        rows = f"on {notes['samples']} samples of {notes['sequence_length']} tokens"
        ridge = "chosen for each on held-out samples" if notes["ridge"] == AUTO else notes["ridge"]
        if refitted:
            how = f"by least squares, ridge {ridge}, {rows}"
            yield f"{len(refitted)} matrices that lost inputs to the cut, re-fitted {how}"
        if filled:
            yield f"{len(filled)} matrices in front of dropped layers, re-fitted {rows} to write what these wrote"
    shares = notes.get(SHARES, {})
    if better := sum(share < 1 for share in shares.values()):
        yield f"{better} of {len(shares)} sub-blocks that were cut, fitted as a whole in {notes['reconstruct']} passes"


def _scaled(notes: dict[str, Any]) -> Iterator[str]:
    if notes.get("folded norms"):
        yield "norms scaled, because hidden channels were cut"
    if notes.get("scaled behind dropped layers"):
        yield "what is written to the residual stream behind dropped layers, scaled to its length there"
    if notes.get("head residual"):
        yield f"kept heads with a part of the heads that were cut ({notes['head residual']})"


def _merged(notes: dict[str, Any]) -> Iterator[str]:
    if merged := notes.get("merged experts"):
        count = sum(len(joined) for groups in merged.values() for joined in groups.values())
        yield f"{count} dropped experts averaged into the kept ones with the most similar rows of the router"


def _recipe(run: Run) -> str:
    """The name of the recipe. A step of a chain lies in the chain's folder; its recipe is the chain."""
    above = run.folder.path.parent / RunFolder.recipe
    chain = read_json(above, "the recipe", CHAIN) if above.is_file() else {}
    steps = [step["name"] for step in chain.get("chain", [])]
    return chain["name"] if run.folder.path.name in steps else run.job.name
