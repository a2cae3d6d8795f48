"""Mixtures of experts: whole experts, the neurons of each, and those of the shared expert.

What an expert sees has lost its sample on the way, so its statistics are per routed token (docs/reductions.md): the
criterion's aggregation over the sequence, over all tokens that came to it. Its activations carry the router's
probability, which Megatron multiplies in before the expert's second matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.importance.estimators.dense import times_input
from nemo_minitron.importance.registry import Estimator, Watch, estimator


@estimator(MoELayer)
class Experts(Estimator):
    """The L2 norm of an expert's router-weighted output, per routed token: [num_layers, experts]."""

    axis = "experts"
    experts = True
    sharded = False

    def watch(self, module: Any, layer: int, architecture: Architecture) -> Watch:
        def norms(_: nn.Module, given: Tensor, output: Any) -> Tensor:
            return torch.linalg.vector_norm(over_shards(output[0].float()), dim=-1)

        return Watch(layer, module.experts, norms, _output_times_gradient, routes=_routes(module))


@estimator(MoELayer)
class ExpertNeurons(Estimator):
    """The input of each expert's second matrix, per routed token: [num_layers, experts, ffn]."""

    axis = "expert_ffn"
    experts = True

    def watches(self, module: Any, layer: int, architecture: Architecture) -> Iterator[Watch]:
        for expert, linear, routes in second_matrices(module):
            yield Watch(layer, linear, _input, times_input, expert=expert, routes=routes)


@estimator(MoELayer)
class SharedExpertNeurons(Estimator):
    """As `dense.Neurons`, of the expert that sees every token: [num_layers, ffn]."""

    axis = "shared_expert_ffn"

    def watch(self, module: Any, layer: int, architecture: Architecture) -> Watch | None:
        shared = getattr(module, "shared_experts", None)
        return None if shared is None else Watch(layer, shared.linear_fc2, _input, times_input)


def second_matrices(mixture: Any) -> Iterator[tuple[int | None, nn.Module, Any]]:
    """(local expert, its second linear, what knows which tokens came to it); None for the expert where a linear takes
    those of all, one after another. Raises InputError for experts that do not show their neurons."""
    routes = _routes(mixture)
    if isinstance(mixture.experts, SequentialMLP):
        for number, expert in enumerate(mixture.experts.local_experts):
            yield number, expert.linear_fc2, routes
    elif hasattr(mixture.experts, "linear_fc2"):  # Transformer Engine's grouped linear
        yield None, mixture.experts.linear_fc2, routes
    else:
        raise InputError(
            f"experts of type {type(mixture.experts).__name__} do not show their neurons; legal are SequentialMLP "
            f"and TEGroupedMLP, or leave the axis 'expert_ffn' out"
        )


def _input(module: nn.Module, given: Tensor, output: Any) -> Tensor:
    return given


def _output_times_gradient(module: nn.Module, given: Tensor, output: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Taylor: of an expert's whole output for a token, the sum over the hidden channels."""
    whole = output[0].detach()

    def product(gradient: Tensor) -> Tensor:
        return over_shards((whole * gradient).float().sum(-1))

    return output[0], product


def over_shards(part: Tensor) -> Tensor:
    """The sum over the ranks that share an expert: under its tensor parallelism an output is a part of one."""
    group = parallel_state.get_expert_tensor_parallel_group()
    if torch.distributed.get_world_size(group) == 1:
        return part
    whole = part.clone()
    torch.distributed.all_reduce(whole, group=group)
    return whole


def _routes(layer: Any) -> Any:
    """What knows which tokens came to which expert. Raises InputError where tokens are dropped or padded."""
    kind = layer.config.moe_token_dispatcher_type
    if kind not in ("allgather", "alltoall"):
        raise InputError(f"experts under the '{kind}' dispatcher are not watched; legal are allgather and alltoall")
    for option in ("moe_expert_capacity_factor", "moe_router_padding_for_fp8"):
        value = getattr(layer.config, option)
        if value not in (None, False):
            raise InputError(
                f"experts whose tokens are dropped or padded, by {option}={value}, are not watched; the legal value "
                f"is {None if option.endswith('factor') else False}"
            )
    return layer.token_dispatcher
