"""Megatron's distributed optimizer over torch's Adam can save its state, but cannot resume from it. It is mended here.

Without Transformer Engine and apex, Megatron asks torch's Adam for its step before there was a first step. So an
optimizer that has not stepped gets the state that it would start from.
"""

from __future__ import annotations

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


def _begin(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
