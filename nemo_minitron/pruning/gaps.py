"""After a cut of layers: what writes to the residual stream behind a gap, scaled to the stream that it finds there.

Behind removed layers the teacher's stream is longer than what the student carries across the gap, in the mean over
tokens by a factor a = exp(mean log |x behind| - mean log |x before|). The student's stream could be multiplied by a at
the gap. A plain checkpoint cannot do so, but the same is got by dividing everything that is written to the stream
behind the gap by a, and by the factors of all gaps before it. The whole stream is then 1/a times as long, and a norm
does not see that: it divides by the stream's own length. So all that reads the stream through a norm, and that is
everything, sees the same numbers, but for the norm's epsilon, which weighs as a^2 times itself would. Each scaled
tensor is rounded once to the stored dtype.

What writes to the stream: `o`, `down` (also of experts), Mamba's `out`, and their biases; or, in a model with norms
behind attention and MLP, those norms. A multiplier of what layers add, as Granite's, is linear and stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.axes import WRITERS, split_expert, split_name
from nemo_minitron.errors import InputError
from nemo_minitron.pruning.selection import shapes_of

STREAM = "stream"  # of Scores: the mean log norm of the residual stream in front of each layer, and behind the last
POST_NORMS = ("post_attention_norm", "post_mlp_norm")


def gaps(plan: PrunePlan) -> Iterator[tuple[int, int]]:
    """(first removed layer, kept layer behind it) of each block of removed layers that a kept layer follows."""
    for before, after in zip([-1, *plan.kept_layers], plan.kept_layers, strict=False):
        if after > before + 1:
            yield before + 1, after


def gap_scales(plan: PrunePlan, scores: Scores) -> dict[str, float]:
    """The student's tensor -> what it is multiplied by; only tensors behind a gap. `scores`: of the plan's source.

    Raises InputError if the plan drops no layers, and for scores of another model or without the stream.
    """
    if plan.source.num_layers == plan.target.num_layers:
        raise InputError("the plan drops no layers, so there is no gap to scale behind")
    check_scores(plan, scores)
    if STREAM not in scores:
        raise InputError(
            f"these scores have no '{STREAM}', which scaling behind dropped layers needs; run minitron estimate again, "
            f"by activation"
        )
    by_layer = _factors(plan, scores[STREAM].astype(np.float64))
    scales = {}
    for name in shapes_of(plan.target):
        layer, _ = split_name(name)
        if layer is not None and by_layer[layer] != 1.0 and writes(name, plan.target):
            scales[name] = by_layer[layer]
    return scales


def check_scores(plan: PrunePlan, scores: Scores) -> None:
    """Raises InputError unless the scores are those of the plan's source."""
    if scores.architecture != plan.source or scores.model_digest != (plan.model_digest or scores.model_digest):
        raise InputError("the scores are those of another model than the plan's")


def _factors(plan: PrunePlan, logs: np.ndarray) -> list[float]:
    """Of each kept layer, in the student's order."""
    growth = {after: logs[after] - logs[first] for first, after in gaps(plan)}
    return [math.exp(-sum(g for after, g in growth.items() if after <= layer)) for layer in plan.kept_layers]


def writes(name: str, architecture: Architecture) -> bool:
    """Whether what this tensor of a layer gives is added to the residual stream."""
    local = split_name(name)[1]
    if architecture.post_norms:
        return local.split(".")[0] in POST_NORMS
    return split_expert(local)[1] in WRITERS
