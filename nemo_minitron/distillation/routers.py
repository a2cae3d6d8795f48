"""The load-balancing loss of a mixture's routers. A distillation leaves it off unless it is asked for; then it logs it.

NeMo itself adds to the gradient of every training what the model's config says (`moe_aux_loss_coeff`, Mixtral's
`router_aux_loss_coef`), and no logged loss shows it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

from nemo_minitron.backend.differences import routers_scale_themselves
from nemo_minitron.errors import InputError

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

ROUTERS = "moe_aux_loss"  # the column of loss.csv
KINDS = ("load_balancing_loss", "seq_load_balancing_loss", "global_load_balancing_loss")  # Megatron's names


def set_routers_loss(config: TransformerConfig, coefficient: float) -> None:
    """Sets what the routers of a live config add to the gradient. Call it before the model is built; the layout is that
    of Megatron's groups, or the config's if they do not exist yet.

    The config that NeMo saves keeps its own value. Raises InputError for a coefficient above 0 if the model has no
    routers.

    If losses are summed per token, Megatron-core 0.15 multiplies the routers' loss by this rank's number of tokens and
    divides it by that of the whole batch. Under sequence and context parallelism a rank has only a part of its tokens,
    so the coefficient is multiplied by the number of parts there; later versions do it themselves.
    """
    if not getattr(config, "num_moe_experts", None):
        if coefficient:
            raise InputError(
                f"moe_aux_loss_coeff is {coefficient:g} and the student is no mixture of experts; the nearest legal "
                "value is 0"
            )
        return
    config.moe_aux_loss_coeff, config.moe_z_loss_coeff = coefficient * _parts(config), None


def _parts(config: TransformerConfig) -> int:
    """The number that the coefficient is multiplied by."""
    if routers_scale_themselves():
        return 1
    # Tensor-parallel ranks split the sequence, too: Megatron trains no mixture under TP without sequence parallelism.
    if parallel_state.model_parallel_is_initialized():
        return parallel_state.get_tensor_model_parallel_world_size() * parallel_state.get_context_parallel_world_size()
    return config.tensor_model_parallel_size * config.context_parallel_size


def routers_loss(micro_batches: int) -> float:
    """What the coefficient multiplied in the last step: Megatron's load-balancing loss, summed over layers.

    A layer that uses its experts evenly has 1. It is the mean over micro-batches and data-parallel ranks. The sums
    start again at 0. Collective over the whole job.
    """
    tracker = get_moe_layer_wise_logging_tracker()
    total = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
    for kind in KINDS:
        if kind in tracker:
            total += tracker[kind]["values"].double().sum()
            tracker[kind]["values"].zero_()
    torch.distributed.all_reduce(total)  # ranks of TP and CP have parts, stages have layers
    return total.item() / (micro_batches * parallel_state.get_data_parallel_world_size())
