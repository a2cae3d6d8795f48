"""Multi-latent attention (DeepSeek, 2405.04434): keys and values of all heads are made of one latent of a token, and
queries of a latent of their own, or of the hidden state. A part of each head's channels is rotary; the rotary part of
the key is the same for all heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nemo_minitron.errors import InputError

if TYPE_CHECKING:
    from nemo_minitron.architecture import Architecture

FIELDS = ("kv_lora_rank", "q_lora_rank", "qk_pos_emb_head_dim", "v_head_dim")
WITHOUT = (  # what no model with latents has here
    "qkv_bias", "attention_output_bias", "qk_norm", "attention_sinks", "post_norms", "hybrid_pattern",
    "attention_window",
)  # fmt: skip
EPSILON = 1e-6  # of the latents' norms: the publisher's code and transformers' have no other


def check(a: Architecture) -> None:
    """Raises InputError if an Architecture's FIELDS contradict each other, or what else it has."""
    if a.kv_lora_rank is None:
        for name in FIELDS:
            if (size := getattr(a, name)) is not None:
                raise InputError(f"{name} is {size}, which needs a kv_lora_rank")
        return
    for name in ("qk_pos_emb_head_dim", "v_head_dim"):
        if getattr(a, name) is None:
            raise InputError(f"a model with a kv_lora_rank needs {name}")
    if a.head_dim <= (a.qk_pos_emb_head_dim or 0):
        raise InputError(
            f"head_dim is {a.head_dim} with {a.qk_pos_emb_head_dim} rotary channels among them; it must be at least "
            f"{(a.qk_pos_emb_head_dim or 0) + 1}"
        )
    if a.num_query_groups != 1:
        raise InputError(f"num_query_groups is {a.num_query_groups}; with a kv_lora_rank the only legal number is 1")
    for name in WITHOUT:
        if getattr(a, name):
            raise InputError(f"{name} is {getattr(a, name)!r}, which is not supported beside a kv_lora_rank")


def shapes(a: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Canonical tensors of a layer's attention: `q` of hidden states, or `q_down`, a norm and `q_up`; `kv_down` to the
    latent and `k_rope` to the rotary key; a norm of the latent and `kv_up` to each head's key and value; `o`."""
    heads, latent = a.num_attention_heads, a.kv_lora_rank or 0
    if a.q_lora_rank:
        yield "q_down.weight", (a.q_lora_rank, a.hidden_size)
        yield "q_latent_norm.weight", (a.q_lora_rank,)
        yield "q_up.weight", (heads * a.head_dim, a.q_lora_rank)
    else:
        yield "q.weight", (heads * a.head_dim, a.hidden_size)
    yield "kv_down.weight", (latent, a.hidden_size)
    yield "k_rope.weight", (a.qk_pos_emb_head_dim or 0, a.hidden_size)
    yield "kv_latent_norm.weight", (latent,)
    yield "kv_up.weight", (heads * a.key_value_dim, latent)
    yield "o.weight", (a.hidden_size, heads * a.value_dim)


def cached(a: Architecture) -> int:
    """The numbers that the KV cache keeps of a token in one layer: the latent and the rotary key, as vLLM and
    TensorRT-LLM keep them; without latents all keys and values."""
    if a.kv_lora_rank:
        return a.kv_lora_rank + (a.qk_pos_emb_head_dim or 0)
    return 2 * a.num_query_groups * a.head_dim


def kept(a: Architecture) -> tuple[int, int]:
    """(Values of a token that a layer's attention keeps for the backward pass and that tensor parallelism divides,
    those that every rank has): queries, keys, values, the output, and the latents before and behind their norms."""
    if not a.kv_lora_rank:
        return (2 * a.num_attention_heads + 2 * a.num_query_groups) * a.head_dim, 0
    latent = a.kv_lora_rank + (a.q_lora_rank or 0)
    return a.num_attention_heads * 2 * (a.head_dim + a.value_dim), 2 * latent + (a.qk_pos_emb_head_dim or 0)
