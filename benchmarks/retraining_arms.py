"""The arms of `retraining.py`, in the order of their runs, each with the arm that it is compared with."""

from __future__ import annotations

import dataclasses

CUTS: dict[str, dict[str, int]] = {
    "none": {},
    "mild": {"ffn": 1280},
    "heavy": {"ffn": 768},
    "width": {"ffn": 512},  # as many parameters as "depth", to 0.02%
    "depth": {"layers": 15},
}
SEEDS = (1, 2, 3)
HALFWAY = {"ffn": 1152}  # the first of two steps of the heavy cut
WIKIPEDIA, MANUAL = "wikipedia", "python manual"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to retrain a cut. `base`: the arm that it is compared with, at the same seeds.

    `loss`: kl, lm, both (their sum), or cached (KL's gradient from sampled logits on disk). `equal_time`: not
    as many tokens as the base, but as many steps as take its CPU seconds. `made`: the cut is made "in one shot", by
    scores from "two rounds" without training between them, or in a "chain" with half of the tokens between the cuts.
    `corrected`: the teacher first learns the same rows with the LM loss, at a fifth of the learning rate.
    """

    name: str
    question: str
    cut: str
    base: str = ""
    loss: str = "kl"
    equal_time: bool = False
    intermediate: bool = False
    made: str = "in one shot"
    corpus: str = WIKIPEDIA
    corrected: bool = False
    random: bool = False


def _loss(cut: str, loss: str = "KL", *, equal_time: bool = False) -> Arm:
    base = f"{cut}, KL" if equal_time or loss != "KL" else ""
    name = f"{cut}, {loss}{', equal time' if equal_time else ''}"
    return Arm(name, f"which loss, {cut} cut", cut, base, loss.lower(), equal_time)


HEAVY = "heavy, KL"
ARMS = (
    _loss("heavy"),
    _loss("heavy", "LM"),
    _loss("heavy", "LM", equal_time=True),
    Arm("random start", "pruned or random start", "heavy", HEAVY, random=True),
    Arm("depth, logits", "intermediate states, depth cut", "depth"),
    Arm("depth, intermediate", "intermediate states, depth cut", "depth", "depth, logits", intermediate=True),
    Arm("width, logits", "width or depth, equal size", "width", "depth, logits"),
    _loss("mild"),
    _loss("mild", "LM"),
    _loss("mild", "LM", equal_time=True),
    Arm("chain", "one step or a chain of two", "heavy", HEAVY, made="chain"),
    Arm("shifted, teacher as it is", "teacher correction", "mild", corpus=MANUAL),
    Arm("shifted, corrected", "teacher correction", "mild", "shifted, teacher as it is", corpus=MANUAL, corrected=True),
    Arm("cached teacher", "cached or online teacher", "heavy", HEAVY, "cached"),
    Arm("two rounds", "one-shot or iterative", "heavy", HEAVY, made="two rounds"),
    _loss("heavy", "both"),
    _loss("mild", "both"),
    _loss("heavy", "both", equal_time=True),
    _loss("mild", "both", equal_time=True),
)
QUESTIONS = tuple(dict.fromkeys(arm.question for arm in ARMS))
