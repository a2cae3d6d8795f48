"""Hooks on a live model, and the statistics that they gather on this rank.

The order of the steps is the method (DESIGN, section 3): a sample's state is merged over the ranks that hold
parts of its sequence before it is finished; finished samples go into the state over samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from nemo_minitron.architecture import Architecture
from nemo_minitron.importance.estimators import Estimator, Watch, estimators_of
from nemo_minitron.importance.statistics import AGGREGATIONS, Aggregation, State, criterion

WIDTH_AXES = ("ffn", "heads", "norms")


class Collector:
    """Watches the model chunks of this rank while it is open; leaves no hook behind, also after an error.

    `states[axis][row]` is the state over the samples that this data-parallel rank has seen, of this
    tensor-parallel rank's channels where the axis is sharded. `samples` and `tokens` count this rank's rows
    of the batch and their (global) positions.
    """

    def __init__(
        self,
        chunks: Iterable[nn.Module],
        architecture: Architecture,
        name: str = "l2,mean",
        axes: Iterable[str] = (*WIDTH_AXES, "layers"),
    ) -> None:
        self.architecture, self.criterion, self.axes = architecture, name, tuple(axes)
        self.over_samples, self.over_sequence = criterion(name)
        self.states: dict[str, dict[int, State]] = {axis: {} for axis in self.axes}
        self.estimators: dict[str, Estimator] = {}
        self.samples = self.tokens = 0
        self._chunks = [unwrap(chunk) for chunk in chunks]
        self._handles: list[Any] = []

    # -- hooks ---------------------------------------------------------------------------------------
    def __enter__(self) -> Collector:
        watches: dict[tuple[str, int], tuple[Estimator, Watch]] = {}
        for chunk in self._chunks:
            for module, layer in _with_layers(chunk.decoder):
                for cls in estimators_of(module):
                    watch = cls().watch(module, layer, self.architecture) if cls.axis in self.axes else None
                    if watch is not None:
                        watches[cls.axis, watch.row] = cls(), watch  # a user's own comes after and wins
            self._handles.append(chunk.register_forward_pre_hook(self._count, with_kwargs=True))
        for estimator, watch in watches.values():
            self.estimators[estimator.axis] = estimator
            hook = self._hook(estimator, watch)
            self._handles.append(watch.module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, estimator: Estimator, watch: Watch) -> Any:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            values = watch.values(module, given.detach(), output)
            state = self._of_samples(values, estimator)
            seen = self.states[estimator.axis]
            merge = self.over_samples.merge if estimator.aggregate else AGGREGATIONS["mean"].merge
            seen[watch.row] = merge(seen[watch.row], state) if watch.row in seen else state

        return hook

    def _of_samples(self, values: Tensor, estimator: Estimator) -> State:
        """[S, B, C] (or [S, B]) of one micro-batch -> its state over samples, [C] (or a scalar)."""
        sequence = self.over_sequence if estimator.aggregate else AGGREGATIONS["mean"]
        state = merge_over(sequence_groups(self._chunks[0].config, estimator), sequence, sequence.start(values))
        if estimator.aggregate:
            return self.over_samples.start(sequence.finish(state))
        return tuple(part.sum(0) for part in state)

    def _count(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if getattr(module, "vp_stage", None) in (None, 0):
            tokens = args[0] if args else kwargs["input_ids"]
            if tokens is not None:
                self.samples += tokens.shape[0]
                self.tokens += tokens.numel() * parallel_state.get_context_parallel_world_size()


def unwrap(chunk: Any) -> Any:
    """Megatron's GPTModel inside NeMo's, DDP's and precision wrappers."""
    while "decoder" not in chunk._modules:  # not hasattr: NeMo's wrappers answer for what they wrap
        chunk = chunk._modules["module"]
    return chunk


def _with_layers(block: Any) -> Iterator[tuple[nn.Module, int]]:
    """Modules of a TransformerBlock with the 0-based global number of their layer (-1 outside of layers)."""
    yield block, -1
    for layer in block.layers:
        if isinstance(layer, TransformerLayer):
            for module in layer.modules():
                yield module, layer.layer_number - 1


def sequence_groups(config: Any, estimator: Estimator) -> list[Any]:
    """The groups over which this estimator's sequence is split."""
    groups = []
    if config.sequence_parallel and not estimator.sharded:
        groups.append(parallel_state.get_tensor_model_parallel_group())
    if parallel_state.get_context_parallel_world_size() > 1:
        groups.append(parallel_state.get_context_parallel_group())
    return groups


def merge_over(groups: list[Any], aggregation: Aggregation, state: State) -> State:
    """The merged state of all ranks of the groups, in rank order, so that every rank gets the same bits."""
    for group in groups:
        size = torch.distributed.get_world_size(group)
        if size == 1:
            continue
        packed = torch.stack(state)
        parts = [torch.empty_like(packed) for _ in range(size)]
        torch.distributed.all_gather(parts, packed, group=group)
        state = tuple(parts[0])
        for part in parts[1:]:
            state = aggregation.merge(state, tuple(part))
    return state
