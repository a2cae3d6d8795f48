"""Mixtures of experts: their legal sizes, which layers are mixtures, and which tensors are an expert's."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import InputError

if TYPE_CHECKING:
    from nemo_minitron.architecture import Architecture

MOST_EXPERTS = 1_000_000  # upper bound over all layers; each expert has its own tensors
RARE = ("moe_router_bias", "moe_router_num_groups", "moe_router_enable_expert_bias")  # fields that few mixtures have
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def one_spelling(a: Architecture) -> dict[str, Any]:
    """The fields that a mixture's sizes fill in, the same for the same model. Raises InputError if they contradict each
    other."""
    experts = a.num_moe_experts or 0
    if a.num_layers * experts > MOST_EXPERTS:
        raise InputError(
            f"{a.num_layers} layers of {experts} experts are {a.num_layers * experts}; legal are 1 to {MOST_EXPERTS}"
        )
    if a.moe_router_topk > experts:
        raise InputError(
            f"moe_router_topk is {a.moe_router_topk} of {experts} experts; the nearest legal one is {experts}"
        )
    if a.hybrid_pattern:
        raise InputError("hybrids with experts are not supported; hybrid_pattern must be None in a mixture")
    if a.mlp_bias and a.moe_shared_expert_intermediate_size:
        raise InputError("shared experts with biases are not supported; mlp_bias must be False beside a shared one")
    if a.moe_shared_expert_gate and not a.moe_shared_expert_intermediate_size:
        raise InputError("moe_shared_expert_gate is set, but there is no shared expert; leave it False")
    if experts % (groups := a.moe_router_num_groups or 1):
        raise InputError(
            f"{experts} experts do not divide into {groups} groups; the nearest legal number of experts is "
            f"{max(1, round(experts / groups)) * groups}"
        )
    pattern = pattern_of(a.moe_layer_freq, a.num_layers)
    width, every = a.moe_ffn_hidden_size or a.ffn_hidden_size, all(pattern)
    return {
        "moe_layer_freq": 1 if every else pattern,
        "moe_ffn_hidden_size": width,
        "ffn_hidden_size": width if every else a.ffn_hidden_size,
    }


def pattern_of(freq: Any, layers: int) -> tuple[int, ...]:
    """Megatron's `moe_layer_freq` -> one 0 (dense) or 1 (mixture) a layer. Raises InputError."""
    if isinstance(freq, int) and not isinstance(freq, bool) and freq >= 1:
        return tuple(int(layer % freq == 0) for layer in range(layers))
    if not isinstance(freq, tuple) or len(freq) != layers or not set(freq) <= {0, 1} or not any(freq):
        raise InputError(
            f"moe_layer_freq is {freq!r}; legal is a whole number of at least 1, or a 0 or 1 for each of the "
            f"{layers} layers with at least one 1, the nearest is 1"
        )
    return freq


def expert_of(name: str) -> int:
    """The number of the expert that a canonical tensor belongs to; -1 for a tensor that every token uses."""
    match = _EXPERT.search(name)
    return int(match[1]) if match else -1
