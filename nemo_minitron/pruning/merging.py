"""After a cut of experts: each dropped expert, merged into the kept expert of its layer that is most like it.

M-SMoE (2310.01334) groups experts by their routers' logits, aligns their neurons and averages each group by how often
its experts were chosen. Here likeness is the cosine of the routers' rows, which a file has without running a model. The
neurons of two experts stand in different orders, so a dropped expert's neurons are first matched with the kept one's,
by the least sum of squared distances over all weights of a neuron. If neurons of experts are cut, too, each neuron that
stays of the kept expert takes its match among all neurons of the dropped one. Routers' kept rows, shared experts, and
experts that no other joins, stay the plan's slices.

If a router chooses groups of experts first, a dropped expert joins a kept one of its own group: a token that chooses
this group then still reaches it.

Shapes (docs/shapes.md): E experts of a layer, H hidden channels. K: an expert's neurons that stay, F: all its neurons,
C: the weights of a neuron.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.artifacts.compensation import Lazy
from nemo_minitron.artifacts.criteria import FREQUENCY, experts_by
from nemo_minitron.artifacts.digest import Index
from nemo_minitron.artifacts.dtypes import as_numbers
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.axes import axis, owners, split_expert, split_name
from nemo_minitron.errors import InputError
from nemo_minitron.pruning.gaps import check_scores
from nemo_minitron.pruning.selection import shapes_of, student_index
from nemo_minitron.sources.tensors import TensorSource, whole


def can_merge(source: Architecture, target: Architecture) -> bool:
    """Whether a cut drops experts."""
    return bool(target.num_moe_experts) and source.num_moe_experts != target.num_moe_experts


def check_merge(source: Architecture, target: Architecture) -> None:
    """Raises InputError if `merge_experts` would refuse the plan, whatever the scores are."""
    if not source.num_moe_experts:
        raise InputError("the model has no experts to merge; leave merge_experts off")
    if not can_merge(source, target):
        raise InputError("the plan drops no experts, so there is nothing to merge; leave merge_experts off")


def check_refitted(names: Iterable[str]) -> None:
    """Raises InputError if one of these re-fitted tensors of the student is an expert's. The least squares hold for the
    kept expert's own neurons, and not for an average."""
    for name in names:
        if split_expert(split_name(name)[1])[0] is not None:
            raise InputError(
                f"the compensation re-fits '{name}', and merge_experts averages experts instead; leave one of them out"
            )


def nearest_kept(router_EH: np.ndarray, kept: list[int], groups: int = 1) -> dict[int, int]:
    """Each dropped expert -> the kept expert of its router's group whose row has the largest cosine with its own; of
    equal ones the first."""
    rows = router_EH.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows, size = rows / np.where(lengths, lengths, 1), len(rows) // groups
    joins = {}
    for expert in sorted(set(range(len(rows))) - set(kept)):
        near = [k for k in kept if k // size == expert // size]
        joins[expert] = near[int(np.argmax(rows[near] @ rows[expert]))]
    return joins


def match(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """For each of K neurons one of F other neurons, int64 [K], none twice, with the least sum of squared distances.

    `pairs`: (weights of the neurons [K, C], those of the others [F, C]) of each matrix; C may differ.
    """
    from scipy.optimize import linear_sum_assignment

    # |a - b|^2 without what is a's alone
    costs_KF = sum((np.square(b_FC).sum(1) - 2 * a_KC @ b_FC.T for a_KC, b_FC in pairs), np.zeros(1))
    others: np.ndarray = linear_sum_assignment(costs_KF)[1]
    return others


def shares(frequency: np.ndarray) -> np.ndarray:
    """Each member's share in a group, float64, from how often it was chosen. The first member is the kept expert; it
    stays as it is if none was ever chosen."""
    frequency = frequency.astype(np.float64)  # in fp32 the shares of equal experts would not give the same expert
    return frequency / frequency.sum() if frequency.any() else np.eye(len(frequency))[0]


def merge_experts(source: TensorSource, plan: PrunePlan, scores: Scores) -> Merged:
    """The tensors of the kept experts that dropped ones join. `scores`: of the plan's source, by activation.

    Raises InputError for a model without experts, a plan that drops none, scores of another model, or that do not know
    how often an expert was chosen, and a router that is not finite.
    """
    check_merge(plan.source, plan.target)
    check_scores(plan, scores)
    return Merged(source, plan, experts_by(scores.states, FREQUENCY))


class Merged(Lazy):
    """The student's canonical names -> merged tensors, fp32 in the student's shapes, each made on access: so no more
    than a tensor of one expert and its like of another are in memory. `frequency` [layers, experts], of the source.

    A tensor that is not finite raises InputError.
    """

    def __init__(self, source: TensorSource, plan: PrunePlan, frequency: np.ndarray) -> None:
        self.source, self.plan, self.frequency = source, plan, frequency
        self.groups = {layer: self._groups(layer) for layer in plan.kept_layers if layer in plan.source.moe_layers}
        self.places = dict(self._places())  # the student's name -> (source layer, kept source expert, pattern)
        self.shapes = {name: shapes_of(plan.target)[name] for name in self.places}
        self.orders: dict[tuple[int, int], np.ndarray] = {}  # (source layer, dropped expert) -> its matched neurons

    def make(self, name: str) -> np.ndarray:
        layer, leader, _ = self.places[name]
        members = [leader, *self.groups[layer][leader]]
        merged = np.zeros(self.shapes[name])
        for expert, share in zip(members, shares(self.frequency[layer, members]), strict=True):
            merged += share * self._read(name, expert, self._order(name, expert))
        return merged.astype(np.float32)

    def described(self) -> JsonObject:
        """Source layer -> kept expert -> the dropped ones that it took in, as plain values."""
        return {str(layer): {str(e): joined for e, joined in found.items()} for layer, found in self.groups.items()}

    def _groups(self, layer: int) -> dict[int, list[int]]:
        """Of a source layer: each kept expert that others join -> those."""
        name = f"layers.{layer}.router.weight"
        rows = self._numbers(name, whole(shapes_of(self.plan.source)[name]))
        kept, groups = self.plan.indices("experts", layer) or [], self.plan.source.moe_router_num_groups or 1
        joins = nearest_kept(rows, kept, groups)
        return {leader: [e for e in joins if joins[e] == leader] for leader in sorted(set(joins.values()))}

    def _places(self) -> Iterator[tuple[str, tuple[int, int, str]]]:
        for name in shapes_of(self.plan.target):
            layer, local = split_name(name)
            expert, pattern = split_expert(local)
            if layer is not None and expert is not None:
                origin = self.plan.kept_layers[layer]
                leader = (self.plan.indices("experts", origin) or [])[expert]
                if leader in self.groups[origin]:
                    yield name, (origin, leader, pattern)

    def _order(self, name: str, expert: int) -> np.ndarray | None:
        """The neurons of a dropped expert that match those of the kept one, of which `name` is a tensor; None: `expert`
        is the kept one, whose neurons the plan names."""
        layer, leader, pattern = self.places[name]
        if expert == leader:
            return None
        if (layer, expert) not in self.orders:
            prefix = name.removesuffix(pattern.partition("{e}.")[2])
            ours = [prefix + row.tensor.partition("{e}.")[2] for row in axis("expert_ffn").rows]
            self.orders[layer, expert] = match(self._pair(other, expert) for other in ours if other in self.places)
        return self.orders[layer, expert]

    def _pair(self, name: str, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """A matrix or bias as weights of neurons: of the kept expert [K, C], and of `expert` [F, C]."""
        dim, every = neurons_of(name), np.arange(self.plan.source.moe_ffn_hidden_size or 0)
        kept, other = self._read(name, self.places[name][1], None), self._read(name, expert, every)
        a, b = (np.moveaxis(values, dim or 0, 0) for values in (kept, other))
        return a.reshape(len(a), -1), b.reshape(len(b), -1)

    def _read(self, name: str, expert: int, order: np.ndarray | None) -> np.ndarray:
        """The tensor of a source expert in the place of the student's `name`, float64: the plan's hidden channels, and
        the neurons `order` (None: those of the plan)."""
        layer, _, pattern = self.places[name]
        index, dim = list(student_index(self.plan, name)[1]), neurons_of(name)
        origin = f"layers.{layer}.{pattern.format(e=expert)}"
        if order is None or dim is None:
            return self._numbers(origin, tuple(index))
        index[dim] = np.sort(order)
        return self._numbers(origin, tuple(index)).take(np.searchsorted(index[dim], order), axis=dim)

    def _numbers(self, name: str, index: Index) -> np.ndarray:
        values = as_numbers(self.source.read(name, index), self.source.dtype(name))
        if not np.isfinite(values).all():
            raise InputError(f"'{name}' holds a number that is not finite, so its expert cannot be merged")
        return values


def neurons_of(name: str) -> int | None:
    """The dimension of a canonical tensor that has an expert's neurons; None if it has none."""
    return next((row.dim for cut, row in owners(name) if cut.name == "expert_ffn"), None)
