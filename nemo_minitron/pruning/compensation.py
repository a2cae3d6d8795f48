"""What can be solved or folded into a student's tensors beside pure selection; each gives the tensors that change.

Names and shapes are the student's, numbers fp32. numpy alone; nothing here needs the student to exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.axes import split_expert, split_name
from nemo_minitron.errors import InputError
from nemo_minitron.pruning.defaults import RIDGE, SIGNS
from nemo_minitron.pruning.selection import shapes_of, student_index
from nemo_minitron.pruning.student import as_numbers
from nemo_minitron.sources.tensors import TensorSource

MATRICES = ("down.weight", "experts.{e}.down.weight", "o.weight")  # what follows a cut of neurons, of heads
NORMS = ("input_norm.weight", "pre_mlp_norm.weight", "final_norm.weight")
Tensors = dict[str, np.ndarray]


# -- after a cut of neurons or heads: the next matrix, by least squares ----------------------------------
def solvable(plan: PrunePlan) -> Iterator[tuple[str, str]]:
    """(student's tensor, teacher's tensor) of each matrix that loses inputs to a cut of ffn, expert_ffn or heads."""
    for name in filter(follows_a_cut, shapes_of(plan.target)):
        origin, (_, kept) = student_index(plan, name)
        if len(kept) < shapes_of(plan.source)[origin][1]:
            yield name, origin


def follows_a_cut(name: str) -> bool:
    """Whether this canonical tensor is one of those that can be solved anew."""
    return split_expert(split_name(name)[1])[1] in MATRICES


def solve(source: TensorSource, plan: PrunePlan, name: str, gram: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """The student's `name` [H', K] that best does what the teacher's matrix W [H', C] did, fp32.

    `gram` [C, C]: sum over tokens of x x^T, of the input x of the teacher's matrix. Minimises
    sum |W x - W' x_K|^2 + r |W' - W_K|^2, so W' = W_K + W_P G_PK (G_KK + r I)^-1 with P what goes, K what stays,
    r = `ridge` times the mean of G_KK's diagonal. Solved in float64. Towards W_K, not towards 0: a ridge without end
    is the plain cut, and where nothing goes, or what goes was always 0, nothing changes.

    Raises InputError for a ridge that is not above 0 and finite, and a Gram matrix of another size or with a number
    that is not finite.
    """
    origin, (rows, kept) = student_index(plan, name)
    size = shapes_of(plan.source)[origin][1]
    if not (ridge > 0 and math.isfinite(ridge)):
        raise InputError(f"ridge is {ridge}; it must be above 0, for example {RIDGE}, and finite")
    if gram.shape != (size, size):
        raise InputError(f"the Gram matrix of '{origin}' is {gram.shape}; its input has {size} channels")
    if not np.isfinite(gram).all():
        raise InputError(f"the Gram matrix of '{origin}' holds a number that is not finite; calibrate in fp32")
    weights = as_numbers(source.read(origin, (rows, np.arange(size))), source.dtype(origin))
    gone = np.setdiff1d(np.arange(size), kept)
    inner = gram[np.ix_(kept, kept)].astype(np.float64)
    damping = ridge * np.trace(inner) / len(kept)
    if damping:  # else nothing that stays ever spoke
        inner[np.diag_indices(len(kept))] += damping
        missing = weights[:, gone] @ gram[np.ix_(gone, kept)]
        weights[:, kept] += np.linalg.solve(inner, missing.T).T
    return weights[:, kept].astype(np.float32)


# -- after a cut of hidden channels: the norms' denominator ----------------------------------------------
def check_fold(source: Architecture, target: Architecture) -> None:
    """Raises InputError where `fold_norms` does."""
    if source.normalization != "rmsnorm":
        raise InputError("folding is exact for RMSNorm alone; this model has LayerNorm, leave it off")
    if source.hidden_size == target.hidden_size:
        raise InputError("the plan cuts no hidden channels, so there is nothing to fold into the norms")


def fold_norms(source: TensorSource, plan: PrunePlan) -> Tensors:
    """The norms' weights times sqrt(all / kept): exact where the channels that went were always 0.

    An RMSNorm over fewer channels divides by a root mean square that is sqrt(all / kept) larger, if what went
    was 0, but for the epsilon under the root. Off by default, as in the papers. In bf16 the
    product is rounded once. Raises InputError for LayerNorm, whose mean would change too, and where hidden is whole.
    """
    check_fold(plan.source, plan.target)
    factor = math.sqrt(plan.source.hidden_size / plan.target.hidden_size)
    names = [name for name in shapes_of(plan.target) if split_name(name)[1] in NORMS]
    return {name: (factor * _slice(source, plan, name)).astype(np.float32) for name in names}


# -- after a cut of heads: what went, added to what stays ------------------------------------------------
def check_residual(source: Architecture, target: Architecture, sign: str) -> None:
    """Raises InputError where `head_residual` does, but for its scores."""
    if sign not in SIGNS:
        raise InputError(f"head residual '{sign}' is unknown; legal are {' and '.join(SIGNS)}")
    of = "num_query_groups" if source.heads_per_group == 1 else "heads_per_group"
    before, after = getattr(source, of), getattr(target, of)
    if before == after or 2 * after < before:
        raise InputError(
            f"{after} of {before} heads stay in a group; a head residual needs some to go, and no more than half: "
            f"the nearest legal number is {min(max(after, -(-before // 2)), before - 1)}"
        )


def head_residual(source: TensorSource, plan: PrunePlan, scores: np.ndarray, sign: str = "paper") -> Tensors:
    """Query heads with the residual of their pruned partners (P1, section 2.3).

    `scores` [num_layers, heads] give the order of importance. Of a query group's L heads, ranked 1 to L with the K that
    stay before those that go, head i in [2K - L + 1, K] becomes head_i + (head_i - head_(2K - i + 1)); "laco" has the
    other sign, with which it becomes its partner. Keys and values too where every head has its own (MHA, the layer
    is then one group). The paper's lower bound, K - (L - K), has L - K + 1 heads for L - K partners.

    Raises InputError where more than half of the heads go, where none do, and for scores of another shape or sign.
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
    """(a head that stays, the head that goes and is added to it), both as numbered in the source layer."""
    size = plan.source.num_attention_heads if alone else plan.source.heads_per_group
    kept = set(plan.indices("heads", layer) or ())
    ranked = sorted(range(plan.source.num_attention_heads), key=lambda head: (-scores[layer][head], head))
    for group in range(plan.source.num_attention_heads // size):
        stays = [head for head in ranked if head // size == group and head in kept]
        goes = [head for head in ranked if head // size == group and head not in kept]
        if stays:  # else the whole group goes
            yield from zip(reversed(stays), goes, strict=False)


def _with_residual(source: TensorSource, plan: PrunePlan, name: str, pairs: dict[int, int], sign: float) -> np.ndarray:
    origin, (rows, *rest) = student_index(plan, name)
    values, size = _slice(source, plan, name), plan.source.head_dim
    heads = [int(row) // size for row in rows[::size]]
    for place, head in enumerate(heads):
        if head in pairs:
            other = np.arange(pairs[head] * size, (pairs[head] + 1) * size)
            partner = as_numbers(source.read(origin, (other, *rest)), source.dtype(origin))
            own = values[place * size : (place + 1) * size]
            own += sign * (own - partner)
    return values.astype(np.float32)


def _slice(source: TensorSource, plan: PrunePlan, name: str) -> np.ndarray:
    origin, index = student_index(plan, name)
    return as_numbers(source.read(origin, index), source.dtype(origin))
