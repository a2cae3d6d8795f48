"""After a cut of layers: the last matrix in front of a gap, and what writes to the residual stream behind it.

Behind removed layers the teacher's stream is longer than what the student carries across the gap, in the mean over
tokens by a factor a = exp(mean log |x behind| - mean log |x before|). The student's stream could be multiplied by a at
the gap. A plain checkpoint cannot do so, but the same is got by dividing everything that is written to the stream
behind the gap by a, and by the factors of all gaps before it. The whole stream is then 1/a times as long, and a norm
does not see that: it divides by the stream's own length. So all that reads the stream through a norm, and that is
everything, sees the same numbers, but for the norm's epsilon, which weighs as a^2 times itself would. Each scaled
tensor is rounded once to the stored dtype.

What writes to the stream: `o`, `down` (also of experts), Mamba's `out`, and their biases; or, in a model with norms
behind attention and MLP, those norms. A multiplier of what layers add, as Granite's, is linear and stays.

The last matrix in front of the gap can also learn, by least squares, to write what the removed layers wrote: a change D
of it for which D h is nearest to y / a - x, with its input h, the stream x in front of the gap and y behind it. Each
token counts by 1 / |y|^2, as the next norm sees it. ReplaceMe (2505.02819) fits a map of the MLP's output; h has more
channels, and the student is as plain. A mixture of experts has no such matrix, and a norm behind it lets no such sum
through.

Shapes (docs/shapes.md): D input channels of a matrix, K those that stay, O its output channels in the student, H hidden
channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from nemo_minitron import hybrid
from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.artifacts.blocks import Gap
from nemo_minitron.axes import WRITERS, split_expert, split_name
from nemo_minitron.errors import InputError
from nemo_minitron.pruning.defaults import GAP_RIDGE
from nemo_minitron.pruning.selection import shapes_of, student_index

STREAM = "stream"  # of Scores: the mean log norm of the residual stream in front of each layer, and behind the last
POST_NORMS = ("post_attention_norm", "post_mlp_norm")
WRITES = {hybrid.MAMBA: "out.weight", hybrid.ATTENTION: "o.weight", hybrid.MLP: "down.weight"}


def gaps(plan: PrunePlan) -> list[Gap]:
    """The blocks of removed layers, in order. One at the end has the number of layers as the layer behind it."""
    ends = [*plan.kept_layers, plan.source.num_layers]
    pairs = zip([-1, *plan.kept_layers], ends, strict=True)
    return [Gap(before + 1, after) for before, after in pairs if after > before + 1]


def last_matrix(architecture: Architecture, gap: Gap) -> str | None:
    """The canonical name, without its layer, of the last matrix in front of a gap that can learn to write what the gap
    wrote; None if there is none."""
    layer = gap.first - 1
    if layer < 0 or architecture.post_norms:
        return None
    if architecture.hybrid_pattern:
        return WRITES[architecture.hybrid_pattern[layer]]
    return WRITES[hybrid.MLP] if layer in architecture.dense_layers else None


def filling(plan: PrunePlan, name: str, sums: np.ndarray, growth: float) -> np.ndarray:
    """The change D of the student's matrix `name`, fp64 [O, K], with which it writes what the gap behind it wrote.

    `sums`: fp64 [D, D + 2H] of `importance/gap_sums.py`. `growth`: log a. The ridge, `GAP_RIDGE` times the mean of the
    diagonal, pulls the change to 0.
    """
    origin, (rows, kept) = student_index(plan, name)
    size, hidden = shapes_of(plan.source)[origin][1], plan.source.hidden_size
    gram_DD, front_DH, behind_DH = np.split(sums, [size, size + hidden], axis=1)
    gram_KK, aim_DH = gram_DD[np.ix_(kept, kept)].copy(), behind_DH * math.exp(-growth) - front_DH
    damping = GAP_RIDGE * np.trace(gram_KK) / len(kept)
    if not damping:  # all inputs that stay were always 0
        return np.zeros((len(rows), len(kept)))
    gram_KK[np.diag_indices(len(kept))] += damping
    return np.linalg.solve(gram_KK, aim_DH[np.ix_(kept, rows)]).T


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
    logs = scores[STREAM].astype(float)
    return scales_behind(plan, {gap: logs[gap.behind] - logs[gap.first] for gap in gaps(plan)})


def scales_behind(plan: PrunePlan, growth: Mapping[Gap, float]) -> dict[str, float]:
    """The student's tensor -> what it is multiplied by. `growth`: log a of each gap."""
    by_layer = [math.exp(-sum(log for gap, log in growth.items() if gap.behind <= layer)) for layer in plan.kept_layers]
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


def writes(name: str, architecture: Architecture) -> bool:
    """Whether what this tensor of a layer gives is added to the residual stream."""
    local = split_name(name)[1]
    if architecture.post_norms:
        return local.split(".")[0] in POST_NORMS
    return split_expert(local)[1] in WRITERS
