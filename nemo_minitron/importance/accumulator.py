"""The statistics of one estimator over the rows of one model chunk, micro-batch by micro-batch.

The order of the steps belongs to the method (docs/reductions.md). The state of a sample is merged over the ranks that
have parts of its sequence, then it is finished, and then it goes into the state over samples.

Shapes (docs/shapes.md): L rows of a score, S positions of the sequence, B sequences, J samples, Z the two halves of the
samples, X further dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_minitron.artifacts.statistics import AGGREGATIONS, TOKENS, Aggregation, State, aggregation_of
from nemo_minitron.backend.collectives import gather
from nemo_minitron.importance.registry import Estimator, Watch
from nemo_minitron.importance.samples import Samples
from nemo_minitron.importance.statistics import Sums, dealt, over_samples, over_sequence, with_counts

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig
    from torch.distributed import ProcessGroup

Pair = tuple[str, str]


class Accumulator:
    """Gathers an estimator's activations under several criteria in one pass.

    A hook only reduces over the sequence (`add`). When the micro-batch has gone through the chunk, `flush` does the
    rest for all rows together, with one collective for each statistic and group. `states[pair]`: fields fp64
    [L, Z, ...] in the order of `rows`.
    """

    def __init__(self, estimator: Estimator, pairs: Sequence[Pair], config: TransformerConfig) -> None:
        self.estimator = estimator
        self.pairs = list(pairs) if estimator.aggregate else [(TOKENS, "mean")]
        self.split = config.sequence_parallel and not estimator.sharded and not estimator.heads_are_positions
        self.groups = _sequence_groups(estimator, self.split)
        self.states: dict[Pair, State] = {}
        self.rows: list[int] = []
        self._pending: dict[int, dict[str, Sums]] = {}
        self._positions = 0

    def add(self, watch: Watch, values: Tensor, samples: Samples) -> None:
        """Takes `values` [S, B, ...] of one row, from the current micro-batch."""
        ids_SB, number = samples.places(self.split), len(samples.counts)
        self._pending[watch.row] = {name: over_sequence(name, values, ids_SB, number) for name in self._sequences()}
        self._positions = values.shape[0]

    def _sequences(self) -> list[str]:
        """The aggregations over the sequence. All ranks need the same order, because each is a collective."""
        return list(dict.fromkeys(sequence for _, sequence in self.pairs))

    def flush(self, samples: Samples) -> None:
        """Takes the finished micro-batch in. Collective over the ranks that share its sequence."""
        if not self._pending:
            return
        self.rows = self.rows or sorted(self._pending)
        pending, self._pending = [self._pending[row] for row in self.rows], {}
        counts_J = samples.local_counts(self.split, self._positions)
        for sequence in self._sequences():
            parts = zip(*(row[sequence] for row in pending), strict=True)
            sums = tuple(torch.stack(part).double() for part in parts)
            state = merge_over(self.groups, AGGREGATIONS[sequence], with_counts(sequence, sums, counts_J))
            self._take(sequence, state, samples)

    def _take(self, sequence: str, state: State, samples: Samples) -> None:
        finished_LJX = AGGREGATIONS[sequence].finish(state)
        for pair in self.pairs:
            if pair[1] != sequence:
                continue
            if pair[0] == TOKENS:  # a mean over all positions needs only sums, which can be added over samples
                new: State = tuple(dealt(field_LJX, samples.deal) for field_LJX in state)
            else:
                new = over_samples(pair[0], finished_LJX, samples.deal)
            old = self.states.get(pair)
            self.states[pair] = new if old is None else aggregation_of(pair).merge(old, new)

    def drop(self) -> None:
        """Forgets a micro-batch that was interrupted."""
        self._pending.clear()


def _sequence_groups(estimator: Estimator, split: bool) -> list[ProcessGroup]:
    """The groups over which this estimator's positions are split."""
    groups = []
    if split or estimator.heads_are_positions:
        groups.append(parallel_state.get_tensor_model_parallel_group())
    groups.append(parallel_state.get_context_parallel_group())
    return groups


def merge_over(groups: Sequence[ProcessGroup], aggregation: Aggregation, state: State) -> State:
    """The merged state of all ranks of the groups, in rank order, so that every rank gets the same bits."""
    for group in groups:
        if torch.distributed.get_world_size(group) == 1:
            continue
        parts = gather(torch.stack(list(state)), group)
        state = tuple(parts[0])
        for part in parts[1:]:
            state = aggregation.merge(state, tuple(part))
    return state
