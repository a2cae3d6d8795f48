"""The tensors of each layer of a decoder: canonical name -> global, unfused, unpadded shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nemo_minitron import hybrid, latents

if TYPE_CHECKING:
    from nemo_minitron.architecture import Architecture

Shapes = dict[str, tuple[int, ...]]
Named = Iterator[tuple[str, tuple[int, ...]]]


def of_layers(a: Architecture) -> list[Shapes]:
    """Each layer's tensors, in order, without the layer's number in their names."""
    first, second = norm(a, "input_norm"), norm(a, "pre_mlp_norm")
    attention = dict(latents.shapes(a) if a.kv_lora_rank else _attention(a))
    dense = dict(_mlp(a, "", a.ffn_hidden_size))
    if a.post_norms:
        attention |= norm(a, "post_attention_norm")
        dense |= norm(a, "post_mlp_norm")
    if a.hybrid_pattern:
        kinds = {hybrid.MAMBA: dict(hybrid.shapes(a)), hybrid.ATTENTION: attention, hybrid.MLP: dense}
        return [first | kinds[symbol] for symbol in a.hybrid_pattern]
    moe, mixtures = dict(_mixture(a)), set(a.moe_layers)
    return [first | attention | second | (moe if i in mixtures else dense) for i in range(a.num_layers)]


def norm(a: Architecture, name: str) -> Shapes:
    """A norm's tensors over the hidden size."""
    kinds = ("weight", "bias") if a.normalization == "layernorm" else ("weight",)
    return {f"{name}.{kind}": (a.hidden_size,) for kind in kinds}


def _attention(a: Architecture) -> Named:
    q, kv = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        yield from _linear(name, rows, a.hidden_size, a.qkv_bias)
    if a.qk_norm:
        yield "q_norm.weight", (a.head_dim,)
        yield "k_norm.weight", (a.head_dim,)
    if a.attention_sinks:
        yield "sinks", (a.num_attention_heads,)
    yield from _linear("o", a.hidden_size, q, a.attention_output_bias)


def _mlp(a: Architecture, prefix: str, ffn: int) -> Named:
    for name in ("gate", "up") if a.gated_mlp else ("up",):
        yield from _linear(f"{prefix}{name}", ffn, a.hidden_size, a.mlp_bias)
    yield from _linear(f"{prefix}down", a.hidden_size, ffn, a.mlp_bias)


def _mixture(a: Architecture) -> Named:
    """The router and all experts."""
    yield from _linear("router", a.num_moe_experts or 0, a.hidden_size, a.moe_router_bias)
    if a.moe_router_enable_expert_bias:
        yield "router.expert_bias", (a.num_moe_experts or 0,)
    for expert in range(a.num_moe_experts or 0):
        yield from _mlp(a, f"experts.{expert}.", a.moe_ffn_hidden_size or 0)
    if a.moe_shared_expert_intermediate_size:
        yield from _mlp(a, "shared_expert.", a.moe_shared_expert_intermediate_size)
        if a.moe_shared_expert_gate:
            yield "shared_expert.router.weight", (1, a.hidden_size)


def _linear(name: str, rows: int, columns: int, bias: bool) -> Named:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)
