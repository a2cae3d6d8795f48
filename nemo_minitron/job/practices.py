"""The papers' best practices beside a recipe, a line for each: what it does, and what they found.

Of 2407.14679 (its "best practices") and 2408.11796.
"""

from __future__ import annotations

import dataclasses

from nemo_minitron.architecture import Architecture
from nemo_minitron.settings.recipe import Job

SMALL = 15_000_000_000  # parameters of the source: below, the papers cut widths before layers
HEAVY = 0.25  # of the layers gone: from there on the papers also compare the states between layers
STEP = 0.5  # of the source's parameters: a student below it is better reached through one between


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the lines depend on. `own_data`: the text is what the teacher was trained on; `rounds` of estimation."""

    source: Architecture
    target: Architecture
    logits: bool = True
    lm_loss: bool = False
    intermediate: bool = False
    correction_tokens: int = 0
    own_data: bool = False
    rounds: int = 1


def facts_of(job: Job, source: Architecture, target: Architecture) -> Facts:
    """Those of a recipe whose teacher and student are known."""
    settings = job.distillation
    return Facts(
        source, target, logits=settings.logits_weight > 0, lm_loss=settings.lm_weight > 0,
        intermediate=bool(settings.intermediate), correction_tokens=settings.correction_tokens,
        own_data=job.data.teachers_own, rounds=job.rounds,
    )  # fmt: skip


def practices(facts: Facts) -> list[str]:
    """One line a practice: what the recipe does, and why the papers would, or would not."""
    return [_axes(facts), _estimation(facts), _loss(facts), _source(facts), _correction(facts)]


def _axes(facts: Facts) -> str:
    source, target = facts.source, facts.target
    size = f"a source of {source.parameters() / 1e9:.3g}B"
    dropped = source.num_layers - target.num_layers
    depth = f"{dropped} of {source.num_layers} layers go"
    narrowed = source.replace(num_layers=target.num_layers, moe_layer_freq=1) != target.replace(moe_layer_freq=1)
    small = source.parameters() < SMALL
    if not dropped:
        return f"axes: widths alone, of {size}: {'below 15B ' * small}a narrower model loses less than a shallower one"
    if not narrowed:
        why = "faster, but below 15B it loses more than width" if small else "the fastest student"
        return f"axes: {depth}, of {size}, no width: {why}"
    return f"axes: {depth} and widths, of {size}, in one cut{': below 15B the papers cut widths first' * small}"


def _estimation(facts: Facts) -> str:
    if facts.rounds == 1:
        return "estimation: once, before the cut: in rounds it costs as many passes and ends equal after retraining"
    return f"estimation: in {facts.rounds} rounds; one is enough, the losses are equal after retraining"


def _loss(facts: Facts) -> str:
    gone = 1 - facts.target.num_layers / facts.source.num_layers
    cut = f"{gone:.0%} of the layers go" if gone else "no layers go"
    if not facts.logits:
        return "loss: of the language model alone: the papers' students learn more from the teacher's logits"
    extra = " with the LM loss, which the papers leave out" if facts.lm_loss else ""
    if facts.intermediate:
        fit = "so deep a cut gains by it" if gone >= HEAVY else "for so mild a cut logits alone do as well"
        return f"loss: KL on logits{extra}, intermediate states and embeddings: {cut}, {fit}"
    fit = "more than a quarter: intermediate=auto would help" if gone >= HEAVY else "so mild a cut needs no more"
    return f"loss: KL on logits alone{extra}: {cut}, {fit}"


def _source(facts: Facts) -> str:
    share = facts.target.parameters() / facts.source.parameters()
    if share >= STEP:
        return f"source: the student keeps {share:.0%} of it: cut the nearest larger model that there is"
    return f"source: the student keeps {share:.0%} of it: a model between the two, cut first, gives a better one"


def _correction(facts: Facts) -> str:
    if facts.own_data:
        used = f", and {facts.correction_tokens:,} tokens are spent" if facts.correction_tokens else ": off"
        return f"teacher correction: not needed on the teacher's own data{used}"
    if facts.correction_tokens:
        return f"teacher correction: {facts.correction_tokens:,} tokens first, since the data is not the teacher's own"
    return "teacher correction: off, though the data is not the teacher's own; distillation.correction_tokens sets it"
