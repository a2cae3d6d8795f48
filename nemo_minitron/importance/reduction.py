"""What every rank has gathered -> Scores in global order, the same on every rank (docs/reductions.md).

States are [L, Z, E, C]: rows, the two halves of the samples, experts (if the axis has them), channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from megatron.core import parallel_state

from nemo_minitron.artifacts import criteria
from nemo_minitron.artifacts.scores import Scores, expected_shapes
from nemo_minitron.artifacts.statistics import State, aggregation_of
from nemo_minitron.backend.collectives import gather, gather_objects
from nemo_minitron.importance.accumulator import Accumulator, merge_over
from nemo_minitron.importance.collector import Collector
from nemo_minitron.importance.diagnostics import check_finite

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


OF_LAYERS = ("ffn_pre_activation", "head_channels", "mamba_channels")  # a row a layer; other scores are made of them


def reduce(collector: Collector, norms: str = "all") -> Scores:
    """Merges data-parallel ranks, concatenates channels over TP and experts over EP, and places rows over PP.

    Collective: every rank of the job must call it. `norms`: "all", or "layers" to leave the final norm out of `hidden`.
    Raises InputError if an activation was not finite; it names the layer.
    """
    a = collector.architecture
    rows = {name: shape[0] for name, shape in expected_shapes(a).items()} | dict.fromkeys(OF_LAYERS, a.num_layers)
    states = _place(_over_stages(_stage_states(collector)), rows)
    check_finite(states)
    tensors = criteria.derive(criteria.finish(states, collector.criteria[0]), a, norms)
    samples, tokens = _counts(collector)
    scores = Scores(
        a, tensors, criterion=collector.criteria[0], norms=norms, samples=samples, tokens=tokens, layout=layout(),
        states=states, method=collector.method,
    )  # fmt: skip
    scores.check()
    return scores


Placed = dict[str, dict[int, np.ndarray]]  # key of a state -> row -> [Z, ...]


def _stage_states(collector: Collector) -> Placed:
    """All samples and all channels of this pipeline stage's rows."""
    placed: Placed = {}
    for accumulators in collector.accumulators:
        for axis in sorted(accumulators):
            accumulator = accumulators[axis]
            for pair, state in sorted(accumulator.states.items()):
                fields = _whole(accumulator, pair, state)
                for name, values in zip(aggregation_of(pair).fields, fields, strict=True):
                    rows = placed.setdefault(f"{axis}/{','.join(pair)}/{name}", {})
                    rows |= dict(zip(accumulator.rows, values.cpu().numpy(), strict=True))
    return placed


def _whole(accumulator: Accumulator, pair: tuple[str, str], state: State) -> State:
    """[L, Z, ...] of all data-parallel ranks, with all channels and experts."""
    estimator = accumulator.estimator
    if estimator.experts:  # the copies of an expert saw different tokens
        state = merge_over([parallel_state.get_expert_data_parallel_group()], aggregation_of(pair), state)
        if estimator.sharded:
            state = _concatenate(state, parallel_state.get_expert_tensor_parallel_group(), -1)
        return _concatenate(state, parallel_state.get_expert_model_parallel_group(), 2)  # [L, Z, E, ...]
    state = merge_over([parallel_state.get_data_parallel_group()], aggregation_of(pair), state)
    return _concatenate(state, parallel_state.get_tensor_model_parallel_group(), -1) if estimator.sharded else state


def _concatenate(state: State, group: ProcessGroup, dim: int) -> State:
    return tuple(torch.cat(gather(field, group), dim) for field in state)


def _over_stages(placed: Placed) -> Placed:
    group = parallel_state.get_pipeline_model_parallel_group()
    joined: Placed = {}
    for stage in gather_objects(placed, group):
        for key, rows in stage.items():
            joined.setdefault(key, {}).update(rows)
    return joined


def _place(placed: Placed, lengths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Rows by their global number. A layer without the module gets zeros, the state of no token at all."""
    states = {}
    for key in sorted(placed):
        rows = placed[key]
        shape = next(iter(rows.values())).shape
        states[key] = np.zeros((max(lengths.get(key.split("/")[0], 0), 1 + max(rows)), *shape))
        for row, value in rows.items():
            states[key][row] = value
    return states


def _counts(collector: Collector) -> tuple[int, int]:
    """Samples and tokens of the whole job. A rank itself knows only those of its data-parallel rank."""
    counts = torch.tensor([collector.samples, collector.tokens], device=torch.cuda.current_device())
    torch.distributed.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    return int(counts[0]), int(counts[1])


def layout() -> dict[str, int]:
    """This job's layout, which Scores keep as a note."""
    return {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "cp": parallel_state.get_context_parallel_world_size(),
        "ep": parallel_state.get_expert_model_parallel_world_size(),
        "dp": parallel_state.get_data_parallel_world_size(),
    }
