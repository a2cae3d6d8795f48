"""The load-balancing loss of a mixture's routers: off in a distillation unless it is asked for, and then measured.

NeMo adds what the model's config says (`moe_aux_loss_coeff`, Mixtral's `router_aux_loss_coef`) to the gradient of every
training, and no logged loss shows it.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

from nemo_minitron.errors import InputError

ROUTERS = "moe_aux_loss"  # the column of loss.csv
KINDS = ("load_balancing_loss", "seq_load_balancing_loss", "global_load_balancing_loss")  # Megatron's names


def set_routers_loss(config: Any, coefficient: float) -> None:
    """Before the model is built, and in its layout: what a NeMo config's routers add to the gradient. The config that
    NeMo saves keeps its own. Raises InputError for a coefficient above 0 where there are no routers.

    Megatron-core 0.15 multiplies it, where losses are summed per token, by a rank's own tokens, and divides by those of
    the whole batch: under sequence and context parallelism a rank has but its part, which is made up for here.
    """
    if not getattr(config, "num_moe_experts", None):
        if coefficient:
            raise InputError(
                f"moe_aux_loss_coeff is {coefficient:g} and the student is no mixture of experts; the nearest legal "
                "value is 0"
            )
        return
    # Megatron trains mixtures under tensor parallelism with sequence parallelism alone
    parts = parallel_state.get_tensor_model_parallel_world_size() * parallel_state.get_context_parallel_world_size()
    config.moe_aux_loss_coeff, config.moe_z_loss_coeff = coefficient * parts, None


def routers_loss(micro_batches: int) -> float:
    """What the coefficient multiplied in the step that has been: the sum over layers of Megatron's load-balancing loss
    (1 where experts are used evenly), the mean over micro-batches and data-parallel ranks. Begins anew. Collective."""
    tracker = get_moe_layer_wise_logging_tracker()
    total = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
    for kind in KINDS:
        if kind in tracker:
            total += tracker[kind]["values"].double().sum()
            tracker[kind]["values"].zero_()
    torch.distributed.all_reduce(total)  # parts of tensor- and context-parallel ranks, layers of stages
    return total.item() / (micro_batches * parallel_state.get_data_parallel_world_size())
