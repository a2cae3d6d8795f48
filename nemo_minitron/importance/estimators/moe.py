"""Mixtures of experts: experts as a whole, the neurons of each, and the neurons of the shared expert.

An expert gets single tokens, not samples, so its statistics are per routed token (docs/reductions.md): the criterion's
aggregation over the sequence runs over all tokens that came to the expert. The activations carry the router's
probability, because Megatron multiplies with it before the expert's second matrix. In the same way those of a shared
expert carry its gate (Qwen2-MoE), which Megatron multiplies the expert's output with: as REAP (2510.13999) weighs an
expert's output by its gate, a unit counts by what it adds to the residual stream.

Shapes (docs/shapes.md): S positions of the sequence, B sequences, H hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.importance.estimators.dense import first_input, times_input
from nemo_minitron.importance.registry import Estimator, Output, Watch, estimator

if TYPE_CHECKING:
    from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher


@estimator(MoELayer)
class Experts(Estimator):
    """The L2 norm of an expert's output, times the router's probability, per routed token: [num_layers, experts]."""

    axis = "experts"
    experts = True
    sharded = False

    def watch(self, module: nn.Module, layer: int, architecture: Architecture) -> Watch:
        def norms(_: nn.Module, module_input: Tensor, output: Output) -> Tensor:
            return torch.linalg.vector_norm(over_shards(output[0].float()), dim=-1)

        return Watch(layer, module.experts, norms, _output_times_gradient, routes=_routes(module))


@estimator(MoELayer)
class ExpertNeurons(Estimator):
    """The input of each expert's second matrix, per routed token: [num_layers, experts, ffn]."""

    axis = "expert_ffn"
    experts = True

    def watches(self, module: nn.Module, layer: int, architecture: Architecture) -> Iterator[Watch]:
        for expert, linear, routes in second_matrices(module):
            yield Watch(layer, linear, first_input, times_input, expert=expert, routes=routes)


@estimator(MoELayer)
class SharedExpertNeurons(Estimator):
    """As `dense.Neurons`, for the expert that gets every token, times its gate where it has one: [num_layers, ffn].

    Taylor needs no gate: the gradient of what lies in front of the gate carries it."""

    axis = "shared_expert_ffn"

    def watch(self, module: nn.Module, layer: int, architecture: Architecture) -> Watch | None:
        shared = getattr(module, "shared_experts", None)
        if shared is None:
            return None
        gate = getattr(shared, "gate_weight", None)
        return Watch(layer, shared.linear_fc2, first_input, times_input) if gate is None else _gated(shared, layer)


def _gated(shared: nn.Module, layer: int) -> Watch:
    """A shared expert's neurons times its gate, fp32; Megatron, too, computes the gate of the expert's input."""
    gates: list[Tensor] = []

    def see(hidden_SBH: Tensor) -> None:
        gate_SB1 = torch.nn.functional.linear(hidden_SBH, shared.gate_weight).sigmoid()
        # the second matrix has the whole sequence, of which this rank's input may be a part
        split = shared.config.sequence_parallel
        gates[:] = [gather_from_sequence_parallel_region(gate_SB1) if split else gate_SB1]

    def values(_: nn.Module, module_input: Tensor, output: Output) -> Tensor:
        return module_input.float() * gates.pop().float()

    return Watch(layer, shared.linear_fc2, values, times_input, before=(shared, see))


def second_matrices(mixture: nn.Module) -> Iterator[tuple[int | None, nn.Module, MoETokenDispatcher | None]]:
    """(local expert, its second linear layer, the dispatcher that knows which tokens came to it).

    The expert is None if one linear layer takes the tokens of all experts, one expert after another. Raises InputError
    for experts whose neurons cannot be watched.
    """
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


def _output_times_gradient(
    module: nn.Module, module_input: Tensor, output: Output
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Taylor: for each token the sum over the hidden channels of an expert's output times its gradient."""
    values = output[0].detach()

    def product(gradient: Tensor) -> Tensor:
        return over_shards((values * gradient).float().sum(-1))

    return output[0], product


def over_shards(part: Tensor) -> Tensor:
    """The sum over the ranks that share an expert. Under the experts' tensor parallelism an output is only a
    summand."""
    group = parallel_state.get_expert_tensor_parallel_group()
    if torch.distributed.get_world_size(group) == 1:
        return part
    total = part.clone()
    torch.distributed.all_reduce(total, group=group)
    return total


def _routes(layer: MoELayer) -> MoETokenDispatcher:
    """The dispatcher, which knows which tokens came to which expert. Raises InputError if it drops or pads tokens."""
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
