"""Every row of the reduction table (docs/reductions.md) done the other way; each must change the scores.

A mutation is a context that patches one place of the package; the worker runs it in a layout where it matters.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from megatron.core import parallel_state

from nemo_minitron.artifacts.statistics import aggregation_of
from nemo_minitron.importance import accumulator, batches, collector, experts, hooks, reduction, samples
from nemo_minitron.importance.accumulator import merge_over
from nemo_minitron.importance.estimators import moe


@contextmanager
def finished_before_merged_over_the_sequence():
    """SP, CP: each rank squares the mean of its own part; the squares are added."""
    group = parallel_state.get_tensor_and_context_parallel_group()
    original = reduction._whole

    def whole(gathered, pair, state):
        if not gathered.estimator.sharded:
            state = merge_over([group], aggregation_of(pair), state)
        return original(gathered, pair, state)

    with patch.object(accumulator, "_sequence_groups", lambda *_: []), patch.object(reduction, "_whole", whole):
        yield


@contextmanager
def roots_before_merged_over_data():
    """DP: each rank takes its root (or divides by its count) and the results are averaged."""

    def wrong(groups, aggregation, state):
        parts = [torch.empty_like(state[0]) for _ in range(torch.distributed.get_world_size(groups[0]))]
        torch.distributed.all_gather(parts, aggregation.finish(state).contiguous(), group=groups[0])
        value = torch.stack(parts).mean(0)
        one = torch.ones_like(value) / 2  # two halves make one
        return {"l2": (value**2,), "mean": (value * one, one), "var": (one, 0 * one, value * one), "max": (value,)}[
            aggregation.name
        ]

    with patch.object(reduction, "merge_over", wrong):
        yield


@contextmanager
def channels_added_over_tensor_parallel_ranks():
    """TP: shards are summed instead of put side by side."""

    def wrong(state, group, dim):
        size = torch.distributed.get_world_size(group)
        parts = [part.clone() for part in state]
        for part in parts:
            torch.distributed.all_reduce(part, group=group)
        return tuple(torch.cat([part] * size, dim) for part in parts)

    with patch.object(reduction, "_concatenate", wrong):
        yield


@contextmanager
def replicas_counted_on_every_rank():
    """TP: norms, which every rank holds whole, are merged as if each rank had seen other samples."""
    original = reduction._whole

    def whole(gathered, pair, state):
        if not gathered.estimator.sharded:
            state = merge_over([parallel_state.get_tensor_model_parallel_group()], aggregation_of(pair), state)
        return original(gathered, pair, state)

    with patch.object(reduction, "_whole", whole):
        yield


@contextmanager
def layers_placed_by_local_number():
    """PP, VPP: a stage's first layer is taken for layer 0."""

    def wrong(block):
        yield block, -1
        for number, layer in enumerate(block.layers):
            yield from ((module, number) for module in layer.modules())

    with patch.object(collector, "with_layers", wrong):
        yield


@contextmanager
def mask_cut_in_one_piece():
    """CP: a rank's mask is taken from one stretch of the sequence, its tokens from both ends."""

    def wrong(batch):
        size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
        return {name: value.chunk(size, dim=1)[rank] for name, value in batch.items()}

    with patch.object(samples, "batch_on_this_cp_rank", wrong):
        yield


@contextmanager
def masks_ignored():
    original = samples.samples_of
    with patch.object(hooks, "samples_of", lambda batch: original({"tokens": batch["tokens"]})):
        yield


@contextmanager
def boundaries_ignored():
    with patch.object(samples, "boundaries_of", lambda batch: None):
        yield


@contextmanager
def tail_counted():
    """The samples that fill up what a layout cannot divide count like the others."""
    original = batches._filled

    def wrong(batch, rows, length):
        filled = original(batch, rows, length)
        return filled | {"loss_mask": torch.ones_like(filled["loss_mask"])}

    with patch.object(batches, "_filled", wrong):
        yield


@contextmanager
def copies_of_experts_not_merged():
    """EP, DP: a rank takes its own experts' tokens for all of them."""
    copies, original = parallel_state.get_expert_data_parallel_group(), reduction.merge_over

    def wrong(groups, aggregation, state):
        return original([group for group in groups if group is not copies], aggregation, state)

    with patch.object(reduction, "merge_over", wrong):
        yield


@contextmanager
def tokens_sent_twice_counted_twice():
    """TP without SP: the copies of a token, one from each tensor-parallel rank, all count."""
    with patch.object(experts, "sends_copies", lambda split: False):
        yield


@contextmanager
def tokens_of_experts_in_rank_order():
    """EP with expert-TP: masks are laid to tokens in the order of ranks, not of arrival."""
    with patch.object(experts, "arrival", lambda tp, ep: range(tp * ep)):
        yield


@contextmanager
def norms_of_an_experts_shards():
    """Expert-TP: the norm of a part of an expert's output."""
    with patch.object(moe, "over_shards", lambda part: part):
        yield


MUTATIONS = {
    function.__name__: function
    for function in (
        finished_before_merged_over_the_sequence, roots_before_merged_over_data,
        channels_added_over_tensor_parallel_ranks, replicas_counted_on_every_rank, layers_placed_by_local_number,
        mask_cut_in_one_piece, masks_ignored, boundaries_ignored, tail_counted, copies_of_experts_not_merged,
        tokens_sent_twice_counted_twice, tokens_of_experts_in_rank_order, norms_of_an_experts_shards,
    )
}  # fmt: skip
