"""The facts of a run that its student's model card tells."""

from __future__ import annotations

from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.artifacts.files import read_json
from nemo_minitron.export import CardFacts
from nemo_minitron.families import resolve
from nemo_minitron.job.run import Run


def card_facts(run: Run) -> CardFacts:
    """Everything is read from the run folder."""
    job, settings = run.job, run.job.distillation
    plan, scores = PrunePlan.load(run.path("plan.json")), Scores.load(run.path("scores.safetensors"))
    base = resolve(job.teacher)
    data = {"name": job.data.name, "license": job.data.licence}
    use = f"calibration and {'prompts, which the teacher continued' if job.generation.wanted else 'distillation'}"
    return CardFacts(
        name=job.name,
        base_model=job.base_model or base.name,
        source=plan.source,
        target=plan.target,
        criterion=scores.criterion + (f", layers by {plan.notes['depth']}" if "depth" in plan.notes else ""),
        samples=scores.samples,
        tokens=scores.tokens,
        plan_digest=plan.digest,
        command=f"minitron compress {job.name}",
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
        numbers=read_json(run.path("numbers.json"), "the numbers"),
        versions=run.manifest.versions,
    )
