"""The statistics of an expert-parallel rank's experts, per routed token.

Shapes (docs/shapes.md): N tokens, S positions of the sequence, B sequences, E experts of this rank, L rows of a score,
Z the two halves of the samples, X further dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from megatron.core.fp8_utils import get_fp8_align_size
from torch import Tensor

from nemo_minitron.artifacts.statistics import AGGREGATIONS, ROUTED, State, aggregation_of
from nemo_minitron.backend.collectives import gather
from nemo_minitron.importance.accumulator import Accumulator, Pair
from nemo_minitron.importance.registry import Estimator, Watch
from nemo_minitron.importance.samples import NOBODY, Samples
from nemo_minitron.importance.statistics import over_sequence, with_counts

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

HALVES = 2


class ExpertAccumulator(Accumulator):
    """`states[(routed, sequence)]`: fields fp64 [L, Z, E, ...]."""

    def __init__(self, estimator: Estimator, pairs: Sequence[Pair], config: TransformerConfig) -> None:
        super().__init__(estimator, pairs, config)
        sequences = [sequence for _, sequence in pairs]
        if estimator.axis == "experts":
            sequences.append("mean")  # REAP and the router's frequency, whatever the criterion (`criteria.experts_by`)
        self.pairs = [(ROUTED, name) for name in dict.fromkeys(sequences)]
        # The dispatcher has spread the tokens over the ranks. `reduce` merges the ranks with copies of an expert.
        self.groups = []
        self.align = align_of(config)
        self._routed: dict[int, dict[int, dict[str, State]]] = {}  # row -> expert -> sequence -> state [1, Z, ...]

    def add(self, watch: Watch, values: Tensor, samples: Samples) -> None:
        """`values` [N, ...] came to one expert or, if watch.expert is None, to each local expert in turn."""
        halves = local_halves(watch.routes, samples)
        experts = range(len(halves)) if watch.expert is None else [watch.expert]
        parts = by_expert(values, [len(halves[expert]) for expert in experts], self.align)
        for expert, part in zip(experts, parts, strict=True):
            self._routed.setdefault(watch.row, {})[expert] = self._states(part, halves[expert])

    def _states(self, values_NX: Tensor, half_N: Tensor) -> dict[str, State]:
        counts_Z = torch.bincount(half_N[half_N >= 0], minlength=HALVES).double()
        states = {}
        for _, name in self.pairs:
            sums = over_sequence(name, values_NX[:, None], half_N[:, None], HALVES)
            states[name] = with_counts(name, tuple(part.double()[None] for part in sums), counts_Z)
        return states

    def flush(self, samples: Samples) -> None:
        """Takes the finished micro-batch in. Not collective: no rank waits for another."""
        if not self._routed:
            return
        self.rows = self.rows or sorted(self._routed)
        for pair in self.pairs:
            new = self._stacked(pair[1])
            old = self.states.get(pair)
            self.states[pair] = new if old is None else aggregation_of(pair).merge(old, new)
        self.drop()

    def _stacked(self, name: str) -> State:
        """[L, Z, E, ...] of all rows and experts."""
        fields = range(len(AGGREGATIONS[name].fields))
        rows = [[experts[e][name] for e in sorted(experts)] for experts in (self._routed[row] for row in self.rows)]
        return tuple(torch.stack([torch.cat([s[i] for s in row]) for row in rows]).transpose(1, 2) for i in fields)

    def drop(self) -> None:
        self._routed = {}


def local_halves(routes: MoETokenDispatcher, samples: Samples) -> list[Tensor]:
    """For each local expert int64 [N]: the half of each token that came to it, -1 if the token does not count.

    `routes`: the layer's token dispatcher. Collective over its ranks, once a micro-batch.
    """
    if routes not in samples.routed:
        split = routes.config.sequence_parallel
        half_SB = samples.halves(split, routes.hidden_shape[0])
        if sends_copies(split):
            half_SB = torch.full_like(half_SB, NOBODY)
        routed_NE, half_N = routing(routes, half_SB.flatten())
        samples.routed[routes] = [half_N[routed_N] for routed_N in routed_NE.unbind(1)]
    return samples.routed[routes]


def align_of(config: TransformerConfig) -> int:
    """Megatron pads the tokens of an expert to a multiple of this number."""
    return get_fp8_align_size(config.fp8_recipe) if config.fp8 else 1


def sends_copies(split: bool) -> bool:
    """Whether another rank sends the same tokens. Without sequence parallelism all tensor-parallel ranks have them."""
    return not split and parallel_state.get_tensor_model_parallel_rank() > 0


def by_expert(values: Tensor, sizes: list[int], align: int) -> list[Tensor]:
    """[tokens of all experts, ...] -> those of each expert. Under FP8 padding up to `align` may follow each expert."""
    steps = sizes if len(values) == sum(sizes) else [-(-size // align) * align for size in sizes]
    return [part[:size] for part, size in zip(values.split(steps), sizes, strict=True)]


def routing(dispatcher: MoETokenDispatcher, half_N: Tensor) -> tuple[Tensor, Tensor]:
    """Bool [N, E], whether a token went to an expert, and int64 [N], its half; of all ranks, in the dispatcher's order.

    An expert's input are the tokens of its column, in that order.
    """
    group = dispatcher.tp_ep_group
    first, last = dispatcher.local_expert_indices[0], dispatcher.local_expert_indices[-1] + 1
    halves = gather(half_N, group)
    if dispatcher.config.moe_token_dispatcher_type == "allgather":
        return dispatcher.local_map, torch.cat(halves)
    tables = [part.bool() for part in gather(dispatcher.routing_map.to(torch.uint8), group)]  # gloo knows no bool
    order = arrival(dispatcher.tp_size, dispatcher.ep_size)
    return torch.cat([tables[k][:, first:last] for k in order]), torch.cat([halves[k] for k in order])


def arrival(tp_size: int, ep_size: int) -> list[int]:
    """The order in which the ranks' tokens come to an expert. The all-to-all over expert-parallel ranks comes first,
    then the gather over the experts' tensor-parallel ranks."""
    return [ep * tp_size + tp for tp in range(tp_size) for ep in range(ep_size)]
