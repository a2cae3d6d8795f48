"""Megatron's tensors <-> canonical tensors: fused QKV, fused gate/up, shards, experts, padded vocabularies.

Only this table knows how Megatron lays a decoder out. A Megatron parameter is a set of pieces; a piece is a box of a
canonical tensor that lies at a place of the parameter. The code that fills a live model, reads a checkpoint or gathers
a model uses the same pieces. No torch and no Megatron here.

Parameters are named with their global layer number: `decoder.layers.7.mlp.linear_fc1.weight`. Experts carry
their number on the rank, one after another (`mlp.experts.local_experts.2.linear_fc1.weight`) or grouped as under
Transformer Engine (`mlp.experts.linear_fc1.weight2`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from nemo_minitron import hybrid, latents
from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import InputError

Box = tuple[tuple[int, int], ...]  # (first, last + 1) per dimension


@dataclasses.dataclass(frozen=True)
class Piece:
    """`box` of the canonical tensor lies at `place` of the Megatron parameter; both have the same extent."""

    tensor: str
    box: Box
    place: Box


@dataclasses.dataclass(frozen=True)
class Shard:
    """A rank's place in the tensor-parallel group (`rank` of `size`) and in the groups of experts.

    Experts are dealt out among `ep_size` ranks, of which this is `ep_rank`; `etp_size` ranks share one expert, and this
    is `etp_rank` of them. The default is the whole parameter, as in a checkpoint's global view.
    """

    rank: int = 0
    size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    etp_rank: int = 0
    etp_size: int = 1

    def of(self, length: int) -> tuple[int, int]:
        """This rank's range of a dimension of `length`."""
        part = length // self.size
        return self.rank * part, (self.rank + 1) * part

    @property
    def expert(self) -> Shard:
        """The shard for the tensors of one expert: `of` and `size` use the tensor parallelism of experts."""
        return dataclasses.replace(self, rank=self.etp_rank, size=self.etp_size)

    @property
    def first(self) -> Shard:
        """The shard of the first rank of the group; a tensor of this rank that the first rank holds too is
        replicated."""
        return dataclasses.replace(self, rank=0, etp_rank=0)


_NORMS = {
    "self_attention.linear_qkv.layer_norm": "input_norm",
    "input_layernorm.": "input_norm",
    "mlp.linear_fc1.layer_norm": "pre_mlp_norm",
    "pre_mlp_layernorm.": "pre_mlp_norm",
    "mixer.in_proj.layer_norm": "input_norm",
    "self_attention.linear_proj.post_layernorm.": "post_attention_norm",
    "mlp.linear_fc2.post_layernorm.": "post_mlp_norm",
    "self_attention.q_layernorm.": "q_norm",
    "self_attention.k_layernorm.": "k_norm",
    "self_attention.kv_layernorm.": "kv_latent_norm",
    "self_attention.linear_kv_up_proj.layer_norm": "kv_latent_norm",
    "self_attention.linear_q_up_proj.layer_norm": "q_latent_norm",
}
_LAYERS = "decoder.layers."
_LINEAR = r"(linear_fc[12]\.(?:weight|bias))"
_EXPERT = re.compile(rf"mlp\.experts\.(?:local_experts\.(\d+)\.{_LINEAR}|{_LINEAR}(\d+))")


def is_expert(parameter: str) -> bool:
    """Whether a parameter belongs to a routed expert; its copies lie in the expert-data-parallel group."""
    return ".mlp.experts." in parameter


def pieces(parameter: str, architecture: Architecture, shard: Shard = Shard()) -> list[Piece]:
    """The pieces of `parameter` on this rank; empty for extra state.

    The padding of a vocabulary lies in no piece. Raises InputError for a parameter that the mapping does not know.
    """
    if parameter.endswith("_extra_state"):
        return []
    if parameter.startswith(_LAYERS):
        layer, local = parameter.removeprefix(_LAYERS).split(".", 1)
        parts = list(_of_layer(local, f"layers.{layer}.", architecture, shard))
    else:
        parts = list(_outside(parameter, architecture, shard))
    if not parts:
        raise InputError(f"the canonical mapping does not know Megatron's parameter '{parameter}'")
    return parts


def _outside(parameter: str, a: Architecture, shard: Shard) -> Iterator[Piece]:
    if parameter.startswith(("decoder.final_layernorm.", "decoder.final_norm.")):
        yield _whole(f"final_norm.{_part(parameter)}", (a.hidden_size,))
    elif parameter in ("embedding.word_embeddings.weight", "output_layer.weight"):
        # The second copy of a tied embedding, on the last pipeline stage, is Megatron's output layer.
        tied = a.tied_embeddings or parameter.startswith("embedding")
        rows = padded_vocab(a.vocab_size, shard.size) // shard.size
        first = min(shard.rank * rows, a.vocab_size)
        last = min(first + rows, a.vocab_size)
        hidden = (0, a.hidden_size)
        yield Piece("embedding.weight" if tied else "head.weight", ((first, last), hidden), ((0, last - first), hidden))


def _of_layer(local: str, prefix: str, a: Architecture, shard: Shard) -> Iterator[Piece]:
    part = _part(local)
    for start, norm in _NORMS.items():
        if local.startswith(start):
            norm, width = _norm(norm, a)
            yield _whole(f"{prefix}{norm}.{part}", (width,))
            return
    columns = ((0, a.hidden_size),) if part == "weight" else ()
    if local == f"self_attention.linear_qkv.{part}":
        yield from _qkv(prefix, part, columns, a, shard)
    elif local == f"self_attention.linear_proj.{part}":
        yield _row_parallel(f"{prefix}o.{part}", a.num_attention_heads * a.value_dim, a, shard)
    elif local.removeprefix("self_attention.") in _LATENTS and a.kv_lora_rank:
        yield from _latents(local.removeprefix("self_attention."), prefix, a, shard)
    elif local == "self_attention.core_attention.softmax_offset":
        first, last = shard.of(a.num_attention_heads)
        yield Piece(f"{prefix}sinks", ((first, last),), ((0, last - first),))
    elif local.startswith("mlp.linear_fc"):
        yield from _mlp(local.removeprefix("mlp."), prefix, a.ffn_hidden_size, a, shard)
    elif local.startswith("mlp.") and a.num_moe_experts:
        yield from _mixture(local, prefix, a, shard)
    elif local.startswith("mixer."):
        yield from _mamba(local.removeprefix("mixer."), prefix, a, shard)


def _norm(norm: str, a: Architecture) -> tuple[str, int]:
    """(Canonical name of a norm, its width.) A hybrid's layer has one norm; multi-latent attention norms the latent of
    queries where others norm queries."""
    if a.hybrid_pattern and norm == "pre_mlp_norm":
        return "input_norm", a.hidden_size
    if a.kv_lora_rank and norm in ("q_norm", "q_latent_norm"):
        return "q_latent_norm", a.q_lora_rank or 0
    widths = {"q_norm": a.head_dim, "k_norm": a.head_dim, "kv_latent_norm": a.kv_lora_rank or 0}
    return norm, widths.get(norm, a.hidden_size)


_LATENTS = {  # a parameter of multi-latent attention -> (the canonical tensors in it, whether TP deals them out)
    "linear_q_proj.weight": (("q.weight",), True),
    "linear_q_down_proj.weight": (("q_down.weight",), False),
    "linear_q_up_proj.weight": (("q_up.weight",), True),
    "linear_kv_down_proj.weight": (("kv_down.weight", "k_rope.weight"), False),
    "linear_kv_up_proj.weight": (("kv_up.weight",), True),
}


def _latents(local: str, prefix: str, a: Architecture, shard: Shard) -> Iterator[Piece]:
    """A rank has complete heads, and all of the projections down to the latents and to the rotary key."""
    tensors, (names, divided), at = dict(latents.shapes(a)), _LATENTS[local], 0
    for name in names:
        rows, columns = tensors[name]
        first, last = shard.of(rows) if divided else (0, rows)
        place = ((at, at + last - first), (0, columns))
        yield Piece(f"{prefix}{name}", ((first, last), (0, columns)), place)
        at += last - first


_OWN = {"A_log": "a_log", "D": "d", "dt_bias": "dt.bias", "norm.weight": "gated_norm.weight"}
_TOGETHER = {  # a parameter of Megatron's mixer -> the canonical tensors in it, one after another
    "in_proj.weight": tuple(f"{part}.weight" for part in ("z", "x", "b", "c", "dt")),
    **{f"conv1d.{kind}": tuple(f"{part}_conv.{kind}" for part in ("x", "b", "c")) for kind in ("weight", "bias")},
}


def _mamba(local: str, prefix: str, a: Architecture, shard: Shard) -> Iterator[Piece]:
    """A rank of tensor parallelism holds complete groups of heads: of each canonical tensor its own part."""
    tensors, local = dict(hybrid.shapes(a)), local.replace("conv1d_", "conv1d.")  # Megatron-core 0.19's name
    whole, _, part = local.rpartition(".")
    if local in _TOGETHER:
        names = _TOGETHER[local]
    elif whole in _TOGETHER:  # a checkpoint has each part under a name of its own
        names = tuple(name for name in _TOGETHER[whole] if name.startswith((f"{part}.".lower(), f"{part}_".lower())))
    else:
        names = (_OWN[local],) if local in _OWN else ()
    if local == "out_proj.weight":
        yield _row_parallel(f"{prefix}out.weight", hybrid.inner(a), a, shard)
    at = 0
    for name in names:
        rows, *rest = tensors[name]
        first, last = shard.of(rows)
        others = tuple((0, size) for size in rest)
        yield Piece(f"{prefix}{name}", ((first, last), *others), ((at, at + last - first), *others))
        at += last - first


def _mixture(local: str, prefix: str, a: Architecture, shard: Shard) -> Iterator[Piece]:
    shared = "mlp.shared_experts."
    experts = a.num_moe_experts or 0
    if local == "mlp.router.weight":
        yield _whole(f"{prefix}router.weight", (experts, a.hidden_size))
    elif local == "mlp.router.expert_bias" and a.moe_router_enable_expert_bias:
        yield _whole(f"{prefix}router.expert_bias", (experts,))
    elif local == "mlp.router.bias" and a.moe_router_bias:
        yield _whole(f"{prefix}router.bias", (experts,))
    elif local == f"{shared}gate_weight":
        yield _whole(f"{prefix}shared_expert.router.weight", (1, a.hidden_size))
    elif local.startswith(shared):
        width = a.moe_shared_expert_intermediate_size or 0
        yield from _mlp(local.removeprefix(shared), f"{prefix}shared_expert.", width, a, shard)
    elif (match := _EXPERT.fullmatch(local)) and (a.mlp_bias or "weight" in local):
        index, on_rank = int(match[1] or match[4]), experts // shard.ep_size
        if index < on_rank:
            expert = f"{prefix}experts.{shard.ep_rank * on_rank + index}."
            yield from _mlp(match[2] or match[3], expert, a.moe_ffn_hidden_size or 0, a, shard.expert)


def _mlp(local: str, prefix: str, width: int, a: Architecture, shard: Shard) -> Iterator[Piece]:
    """`linear_fc1` ([gate; up] of this rank's part of `width`) or `linear_fc2`."""
    part = _part(local)
    columns = ((0, a.hidden_size),) if part == "weight" else ()
    if local == f"linear_fc1.{part}":
        first, last = shard.of(width)
        for i, name in enumerate(("gate", "up") if a.gated_mlp else ("up",)):
            at = i * (last - first)
            place = ((at, at + last - first), *columns)
            yield Piece(f"{prefix}{name}.{part}", ((first, last), *columns), place)
    elif local == f"linear_fc2.{part}":
        yield _row_parallel(f"{prefix}down.{part}", width, a, shard)


def _row_parallel(tensor: str, length: int, a: Architecture, shard: Shard) -> Piece:
    """A matrix [hidden, length] split along its columns; its bias is whole on every rank."""
    if tensor.endswith("bias"):
        return _whole(tensor, (a.hidden_size,))
    first, last = shard.of(length)
    rows = (0, a.hidden_size)
    return Piece(tensor, (rows, (first, last)), (rows, (0, last - first)))


def _qkv(prefix: str, part: str, columns: Box, a: Architecture, shard: Shard) -> Iterator[Piece]:
    """The rows of fused QKV are [group][its query heads, key, value]; each rank holds complete groups."""
    q, kv, at = a.heads_per_group * a.head_dim, a.head_dim, 0
    for group in range(*shard.of(a.num_query_groups)):
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            box = ((group * rows, (group + 1) * rows), *columns)
            yield Piece(f"{prefix}{name}.{part}", box, ((at, at + rows), *columns))
            at += rows


def _whole(tensor: str, shape: tuple[int, ...]) -> Piece:
    box = tuple((0, n) for n in shape)
    return Piece(tensor, box, box)


def _part(parameter: str) -> str:
    return "bias" if parameter.endswith("bias") else "weight"


def padded_vocab(vocab_size: int, tp: int) -> int:
    """The smallest multiple of `tp` that holds the vocabulary: the padded size in a model of this layout."""
    return -(-vocab_size // tp) * tp
