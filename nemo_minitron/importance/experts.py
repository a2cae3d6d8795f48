"""The statistics of an expert-parallel rank's experts, per routed token."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fp8_utils import get_fp8_align_size
from torch import Tensor

from nemo_minitron.artifacts.statistics import AGGREGATIONS, ROUTED, State, aggregation_of
from nemo_minitron.backend.collectives import gather
from nemo_minitron.importance.accumulator import Accumulator
from nemo_minitron.importance.registry import Estimator, Watch
from nemo_minitron.importance.samples import NOBODY, Samples
from nemo_minitron.importance.statistics import over_sequence, with_counts

HALVES = 2


class ExpertAccumulator(Accumulator):
    """`states[(routed, sequence)]`: fields fp64 [rows, 2 halves, local experts, ...]."""

    def __init__(self, estimator: Estimator, pairs: Any, config: Any) -> None:
        super().__init__(estimator, pairs, config)
        self.pairs = [(ROUTED, name) for name in dict.fromkeys(sequence for _, sequence in pairs)]
        self.groups = []  # tokens were dealt out already: ranks with copies of an expert are merged at the end
        self.align = align_of(config)
        self._routed: dict[int, dict[int, dict[str, State]]] = {}  # row -> expert -> sequence -> state [1, 2, ...]

    def add(self, watch: Watch, values: Tensor, samples: Samples) -> None:
        """[tokens, ...] that came to one expert or, with watch.expert None, to the local ones in turn."""
        halves = local_halves(watch.routes, samples)
        wanted = range(len(halves)) if watch.expert is None else [watch.expert]
        parts = by_expert(values, [len(halves[expert]) for expert in wanted], self.align)
        for expert, part in zip(wanted, parts, strict=True):
            self._routed.setdefault(watch.row, {})[expert] = self._states(part, halves[expert])

    def _states(self, values: Tensor, halves: Tensor) -> dict[str, State]:
        counts = torch.bincount(halves[halves >= 0], minlength=HALVES).double()
        states = {}
        for _, name in self.pairs:
            heavy = over_sequence(name, values[:, None], halves[:, None], HALVES)
            states[name] = with_counts(name, tuple(part.double()[None] for part in heavy), counts)
        return states

    def flush(self, samples: Samples) -> None:
        """Takes the finished micro-batch in; no rank waits for another."""
        if not self._routed:
            return
        self.rows = self.rows or sorted(self._routed)
        for pair in self.pairs:
            new = self._stacked(pair[1])
            old = self.states.get(pair)
            self.states[pair] = new if old is None else aggregation_of(pair).merge(old, new)
        self.drop()

    def _stacked(self, name: str) -> State:
        """[rows, halves, experts, ...] of all rows and experts."""
        fields = range(len(AGGREGATIONS[name].fields))
        rows = [[experts[e][name] for e in sorted(experts)] for experts in (self._routed[row] for row in self.rows)]
        return tuple(torch.stack([torch.cat([s[i] for s in row]) for row in rows]).transpose(1, 2) for i in fields)

    def drop(self) -> None:
        self._routed = {}


def local_halves(routes: Any, samples: Samples) -> list[Tensor]:
    """Local expert -> int64 [tokens]: the half of each token that came to it, -1 for one that does not count.

    `routes`: the layer's token dispatcher. Collective over its ranks, once a micro-batch.
    """
    if routes not in samples.routed:
        split = routes.config.sequence_parallel
        halves = samples.halves(split, routes.hidden_shape[0])
        if sends_copies(split):
            halves = torch.full_like(halves, NOBODY)
        table, halves = routing(routes, halves.flatten())
        samples.routed[routes] = [halves[column] for column in table.unbind(1)]
    return samples.routed[routes]


def align_of(config: Any) -> int:
    """To a multiple of how many tokens Megatron pads an expert's."""
    return get_fp8_align_size(config.fp8_recipe) if config.fp8 else 1


def sends_copies(split: bool) -> bool:
    """Whether another rank sends the tokens of this one: without sequence parallelism tensor-parallel ranks do."""
    return not split and parallel_state.get_tensor_model_parallel_rank() > 0


def by_expert(values: Tensor, sizes: list[int], align: int) -> list[Tensor]:
    """[tokens of all, ...] -> those of each expert; under FP8 each may be followed by padding up to `align`."""
    steps = sizes if len(values) == sum(sizes) else [-(-size // align) * align for size in sizes]
    return [part[:size] for part, size in zip(values.split(steps), sizes, strict=True)]


def routing(dispatcher: Any, halves: Tensor) -> tuple[Tensor, Tensor]:
    """Bool [tokens, local experts] and int64 [tokens], for all tokens of the dispatcher's ranks, in its order.

    An expert's input are the tokens of its column, in that order.
    """
    group = dispatcher.tp_ep_group
    first, last = dispatcher.local_expert_indices[0], dispatcher.local_expert_indices[-1] + 1
    gathered = gather(halves, group)
    if dispatcher.config.moe_token_dispatcher_type == "allgather":
        return dispatcher.local_map, torch.cat(gathered)
    tables = [part.bool() for part in gather(dispatcher.routing_map.to(torch.uint8), group)]  # gloo knows no bool
    order = arrival(dispatcher.tp_size, dispatcher.ep_size)
    return torch.cat([tables[k][:, first:last] for k in order]), torch.cat([gathered[k] for k in order])


def arrival(tp_size: int, ep_size: int) -> list[int]:
    """In what order the ranks' tokens come to an expert: all-to-all over expert-parallel ranks first, then gathered
    over the experts' tensor-parallel ones."""
    return [ep * tp_size + tp for tp in range(tp_size) for ep in range(ep_size)]
