"""The papers' best practices beside a recipe, a line for each: what the recipe does, and what the papers found.

The practices are those of 2407.14679 (its "best practices") and of 2408.11796.
"""

from __future__ import annotations

import dataclasses

from nemo_minitron.architecture import Architecture
from nemo_minitron.axes import AXES
from nemo_minitron.settings.recipe import Job

SMALL = 15_000_000_000  # parameters of the source; in a smaller one the papers cut widths before layers
HEAVY = 0.25  # share of dropped layers from which the papers also compare the states between layers
STEP = 0.5  # share of the source's parameters; a smaller student is better cut from a model between the two


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the lines depend on. `own_data`: the teacher was trained on this text. `rounds`: those of the estimation."""

    source: Architecture
    target: Architecture
    logits: bool = True
    lm_loss: bool = False
    intermediate: bool = False
    correction_tokens: int = 0
    own_data: bool = False
    rounds: int = 1


def facts_of(job: Job, source: Architecture, target: Architecture) -> Facts:
    """The facts of a recipe whose teacher and student are known."""
    settings = job.distillation
    return Facts(
        source, target, logits=settings.logits_weight > 0, lm_loss=settings.lm_weight > 0,
        intermediate=bool(settings.intermediate), correction_tokens=settings.correction_tokens,
        own_data=job.data.teachers_own, rounds=job.rounds,
    )  # fmt: skip


def practices(facts: Facts) -> list[str]:
    """One line for each practice: what the recipe does, and why the papers would do the same or not."""
    return [_axes(facts), _estimation(facts), _loss(facts), _source(facts), _correction(facts)]


def _axes(facts: Facts) -> str:
    source, target = facts.source, facts.target
    size = f"a source of {source.parameters() / 1e9:.3g}B"
    dropped = source.num_layers - target.num_layers
    depth = f"{dropped} of {source.num_layers} layers are dropped"
    narrowed = any(axis.length(source) != axis.length(target) for name, axis in AXES.items() if name != "layers")
    small = source.parameters() < SMALL
    if not dropped:
        return f"axes: only widths, of {size}: {'below 15B ' * small}a narrower model loses less than a shallower one"
    if not narrowed:
        why = "faster, but below 15B it loses more than width" if small else "the fastest student"
        return f"axes: {depth}, of {size}, and no width is cut: {why}"
    return f"axes: {depth} and widths cut, of {size}, at once{': below 15B the papers cut widths first' * small}"


def _estimation(facts: Facts) -> str:
    if facts.rounds == 1:
        return "estimation: once, before the cut: rounds cost one pass each, and the losses are equal after retraining"
    return f"estimation: in {facts.rounds} rounds: one is enough, since the losses are equal after retraining"


def _loss(facts: Facts) -> str:
    dropped = 1 - facts.target.num_layers / facts.source.num_layers
    cut = f"{dropped:.0%} of the layers are dropped" if dropped else "no layers are dropped"
    if not facts.logits:
        return "loss: the language-model loss alone: the papers' students learn more from the teacher's logits"
    extra = " with the LM loss, which the papers leave out" if facts.lm_loss else ""
    if facts.intermediate:
        fit = "a cut so deep gains by them" if dropped >= HEAVY else "logits alone do as well for a cut so mild"
        return f"loss: KL on logits{extra}, intermediate states and embeddings: {cut}, {fit}"
    fit = "more than a quarter, so intermediate=auto would help" if dropped >= HEAVY else "a cut so mild needs no more"
    return f"loss: KL on logits alone{extra}: {cut}, {fit}"


def _source(facts: Facts) -> str:
    share = facts.target.parameters() / facts.source.parameters()
    if share >= STEP:
        return f"source: the student keeps {share:.0%} of it: cut the smallest model that is larger than the student"
    return f"source: the student keeps {share:.0%} of it: cut a model between the two first, for a better student"


def _correction(facts: Facts) -> str:
    if facts.own_data:
        used = f", but {facts.correction_tokens:,} tokens are spent" if facts.correction_tokens else ": off"
        return f"teacher correction: not needed on the teacher's own data{used}"
    if facts.correction_tokens:
        return f"teacher correction: on {facts.correction_tokens:,} tokens, since the data is not the teacher's own"
    return "teacher correction: off, but the data is not the teacher's own; set distillation.correction_tokens"
