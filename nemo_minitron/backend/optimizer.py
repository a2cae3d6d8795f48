"""Two faults of Megatron's distributed optimizer when it is saved, mended.

Over torch's Adam, that is without Transformer Engine and apex, it can save its state but not resume from it: it asks
Adam for its step before there was a first step (`install`). On every machine it saves wrong numbers if a gradient
buffer has more than one bucket and one of them is padded (`save_whole`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from nemo_minitron.backend.versions import replace


def install() -> None:
    """Mends saving and loading of `DistributedOptimizer`, if Megatron uses torch's Adam."""
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer = distrib_optimizer.DistributedOptimizer
    original, set_states = optimizer.state_dict, optimizer._set_main_param_and_optimizer_states

    def state_dict(self: Any) -> Any:
        if not self.optimizer.state:
            _begin(self.optimizer)
        return original(self)

    def set_all(self: Any, model_param: Any, tensors: Any) -> None:
        """The step is no tensor of the checkpoint. It has been loaded with the parameter groups."""
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:  # Megatron gives all parameters the same counter, and Adam would raise it for each of them
            state["step"] = state["step"].clone()
            tensors = {**tensors, "step": state["step"]}
        set_states(self, model_param, tensors)

    replace(optimizer, "state_dict", state_dict)
    replace(optimizer, "_set_main_param_and_optimizer_states", set_all)


@functools.cache
def save_whole() -> None:
    """Mends the format of checkpoints that another layout can read (Megatron-core 0.15 to 0.19). Only the first call of
    a process does something. Call it before a training.

    Megatron gathers a buffer without the padding behind each bucket, and then looks the parameters up at their places
    with the padding: every parameter behind the first bucket is saved from a wrong place. A tied embedding in pipeline
    stages has a bucket of its own, which is padded where 128 does not divide its numbers.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer.sharded_param_state_fully_reshardable

    @functools.wraps(original)
    def saved(self: Any, *arguments: Any, **options: Any) -> Any:
        gather = self.get_parameter_state_dp_zero
        self.get_parameter_state_dp_zero = lambda *args, **kwargs: _in_place(self.buffers, gather(*args, **kwargs))
        try:
            return original(self, *arguments, **options)
        finally:
            del self.get_parameter_state_dp_zero

    replace(DistributedOptimizer, "sharded_param_state_fully_reshardable", saved)


def _in_place(buffers: Sequence[Any], state: Any) -> Any:
    """A gathered state whose tensors have the padding between buckets again. Other ranks have none."""
    for index, buffer in enumerate(buffers):
        if state is None or len(buffer.buckets) == 1:
            continue
        for tensors in state[index].values():
            for name, gathered in tensors.items():
                if torch.is_tensor(gathered):
                    tensors[name], start = gathered.new_zeros(buffer.numel), 0
                    for bucket in buffer.buckets:
                        end = start + bucket.numel_unpadded
                        tensors[name][bucket.offset : bucket.offset + end - start] = gathered[start:end]
                        start = end
    return state


def _begin(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
