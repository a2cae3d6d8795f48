"""What can be fitted or folded into a student's tensors, beyond pure selection. Each function gives the changed
tensors.

Names and shapes are the student's, numbers are fp32. Only numpy is needed, and the student need not exist.

Shapes (docs/shapes.md): D input channels of a matrix, O its output channels in the student, K kept input channels, L
layers, A attention heads. I: the input channels that are cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.artifacts.dtypes import as_numbers
from nemo_minitron.axes import split_expert, split_name
from nemo_minitron.errors import InputError
from nemo_minitron.pruning.defaults import RIDGE, SIGNS
from nemo_minitron.pruning.rescale import factor, times
from nemo_minitron.pruning.selection import shapes_of, student_index
from nemo_minitron.sources.tensors import TensorSource

MATRICES = ("down.weight", "experts.{e}.down.weight", "o.weight")  # they lose inputs to a cut of neurons or heads
NORMS = tuple(f"{norm}_norm.weight" for norm in ("input", "post_attention", "pre_mlp", "post_mlp", "final"))
Tensors = dict[str, np.ndarray]


# -- after a cut of neurons or heads: the next matrix, by least squares ----------------------------------
def solvable(plan: PrunePlan) -> Iterator[tuple[str, str]]:
    """(student's tensor, teacher's tensor) of each matrix that loses inputs to a cut of ffn, expert_ffn or heads."""
    for name in filter(follows_a_cut, shapes_of(plan.target)):
        origin, (_, kept) = student_index(plan, name)
        if len(kept) < shapes_of(plan.source)[origin][1]:
            yield name, origin


def follows_a_cut(name: str) -> bool:
    """Whether this canonical tensor is a matrix that can be re-fitted when it loses inputs to the cut."""
    return split_expert(split_name(name)[1])[1] in MATRICES


def solve(source: TensorSource, plan: PrunePlan, name: str, gram: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """The student's `name`, fp32 [O, K], that best replaces the teacher's matrix W [O, D].

    `gram` [D, D]: the sum over tokens of x x^T, of the input x of the teacher's matrix. W' minimises
    sum |W x - W' x_K|^2 + r |W' - W_K|^2. So W' = W_K + W_P G_PK (G_KK + r I)^-1, with K the inputs that stay, P those
    that are cut, and r = `ridge` times the mean of the diagonal of G_KK. Solved in float64. The ridge pulls towards
    W_K, not towards 0: an infinite ridge would give the plain cut. If no input is cut, or if the inputs that are cut
    were always 0, nothing changes.

    Raises InputError for a ridge that is not positive and finite, and for a Gram matrix that has another size or a
    number that is not finite.
    """
    origin, (rows, kept) = student_index(plan, name)
    size = shapes_of(plan.source)[origin][1]
    if not (ridge > 0 and math.isfinite(ridge)):
        raise InputError(f"ridge is {ridge}; it must be above 0, for example {RIDGE}, and finite")
    check_gram(gram, origin, size)
    weight_OD = as_numbers(source.read(origin, (rows, np.arange(size))), source.dtype(origin))
    gone_I = np.setdiff1d(np.arange(size), kept)
    gram_KK = gram[np.ix_(kept, kept)].astype(np.float64)
    damping = ridge * np.trace(gram_KK) / len(kept)
    if damping:  # it is 0 if all inputs that stay were always 0
        gram_KK[np.diag_indices(len(kept))] += damping
        missing_OK = weight_OD[:, gone_I] @ gram[np.ix_(gone_I, kept)]
        weight_OD[:, kept] += np.linalg.solve(gram_KK, missing_OK.T).T
    return weight_OD[:, kept].astype(np.float32)


def check_gram(gram: np.ndarray, origin: str, size: int) -> None:
    """Raises InputError for a Gram matrix of another size than the `size` inputs of the teacher's `origin`, and for a
    number in it that is not finite."""
    if gram.shape != (size, size):
        raise InputError(f"the Gram matrix of '{origin}' is {gram.shape}; its input has {size} channels")
    if not np.isfinite(gram).all():
        raise InputError(f"the Gram matrix of '{origin}' holds a number that is not finite; calibrate in fp32")


# -- after a cut of hidden channels: the norms' denominator ----------------------------------------------
def can_fold(source: Architecture, target: Architecture) -> bool:
    """Whether a cut leaves norms to fold: of hidden channels, in a model with RMSNorm."""
    return source.normalization == "rmsnorm" and source.hidden_size != target.hidden_size


def check_fold(source: Architecture, target: Architecture) -> None:
    """Raises InputError if `fold_norms` would refuse the plan."""
    if source.normalization != "rmsnorm":
        raise InputError("folding is exact for RMSNorm alone; this model has LayerNorm, leave it off")
    if source.hidden_size == target.hidden_size:
        raise InputError("the plan cuts no hidden channels, so there is nothing to fold into the norms")


def fold_norms(source: TensorSource, plan: PrunePlan) -> Tensors:
    """The norms' weights times a factor. It makes the cut exact if the channels that are cut were always 0.

    If the channels that are cut were 0, the root mean square over the kept ones is sqrt(all / kept) times as large
    (apart from the epsilon under the root). An RMSNorm divides by it, so its weights are multiplied by sqrt(all /
    kept). Jobs do it by default; the papers do not. In bf16 the product is rounded once. A norm behind attention or MLP
    loses the channels of its input, too.

    Raises InputError for LayerNorm, whose mean would change, too, and if the plan cuts no hidden channels.
    """
    check_fold(plan.source, plan.target)
    by = math.sqrt(plan.source.hidden_size / plan.target.hidden_size)
    names = [name for name in shapes_of(plan.target) if split_name(name)[1] in NORMS]
    return {n: times(_slice(source, plan, n), by * factor(plan, n), plan, n).astype(np.float32) for n in names}


# -- after a cut of heads: what went, added to what stays ------------------------------------------------
def check_residual(source: Architecture, target: Architecture, sign: str) -> None:
    """Raises InputError if `head_residual` would refuse the plan, whatever the scores are."""
    if sign not in SIGNS:
        raise InputError(f"head residual '{sign}' is unknown; legal are {' and '.join(SIGNS)}")
    if source.attention_sinks:
        raise InputError("a head residual is not defined for heads with attention sinks; leave it off")
    if source.kv_lora_rank:
        raise InputError("a head residual is not defined for multi-latent attention; leave it off")
    of = "num_query_groups" if source.heads_per_group == 1 else "heads_per_group"
    before, after = getattr(source, of), getattr(target, of)
    if before == after or 2 * after < before:
        raise InputError(
            f"{after} of {before} heads stay in a group; a head residual needs a cut of some heads, of at most half: "
            f"the nearest legal number is {min(max(after, -(-before // 2)), before - 1)}"
        )


def head_residual(source: TensorSource, plan: PrunePlan, scores: np.ndarray, sign: str = "paper") -> Tensors:
    """Query heads with the residual of their pruned partners (2407.14679, section 2.3).

    `scores` [L, A] give the order of importance. In each query group n heads are ranked 1 to n, so that the k heads
    that stay come before those that are cut. Head i in [2k - n + 1, k] becomes head_i + (head_i - head_(2k - i + 1)).
    With "laco" the sign is the opposite, so the head becomes its partner. If every head has its own keys and values
    (MHA), they change as well, and the layer is one group. The paper's lower bound, k - (n - k), would be one head too
    many.

    Raises InputError if more than half of the heads go or none, for scores of another shape, and for an unknown sign.
    """
    a, b = plan.source, plan.target
    check_residual(a, b, sign)
    if scores.shape != (a.num_layers, a.num_attention_heads):
        raise InputError(f"scores of heads are {scores.shape}; the model has {(a.num_layers, a.num_attention_heads)}")
    alone, changed = a.heads_per_group == 1, {}
    for name in shapes_of(b):
        layer, local = split_name(name)
        if layer is not None and local.split(".")[0] in ("qkv" if alone else "q") and "norm" not in local:
            pairs = dict(_partners(plan, plan.kept_layers[layer], scores, alone))
            changed[name] = _with_residual(source, plan, name, pairs, SIGNS[sign])
    return changed


def _partners(plan: PrunePlan, layer: int, scores: np.ndarray, alone: bool) -> Iterator[tuple[int, int]]:
    """(a head that stays, its partner among the heads that are cut), both as numbered in the source layer."""
    size = plan.source.num_attention_heads if alone else plan.source.heads_per_group
    kept = set(plan.indices("heads", layer) or ())
    ranked = sorted(range(plan.source.num_attention_heads), key=lambda head: (-scores[layer][head], head))
    for group in range(plan.source.num_attention_heads // size):
        stays = [head for head in ranked if head // size == group and head in kept]
        goes = [head for head in ranked if head // size == group and head not in kept]
        if stays:  # else the whole group is cut
            yield from zip(reversed(stays), goes, strict=False)


def _with_residual(source: TensorSource, plan: PrunePlan, name: str, pairs: dict[int, int], sign: float) -> np.ndarray:
    origin, (rows, *rest) = student_index(plan, name)
    values, size = _slice(source, plan, name), plan.source.head_dim
    heads = [int(row) // size for row in rows[::size]]
    for place, head in enumerate(heads):
        if head in pairs:
            other = np.arange(pairs[head] * size, (pairs[head] + 1) * size)
            partner = as_numbers(source.read(origin, (other, *rest)), source.dtype(origin))
            rows_of_head = values[place * size : (place + 1) * size]
            rows_of_head += sign * (rows_of_head - partner)
    return values.astype(np.float32)


def _slice(source: TensorSource, plan: PrunePlan, name: str) -> np.ndarray:
    origin, index = student_index(plan, name)
    return as_numbers(source.read(origin, index), source.dtype(origin))
