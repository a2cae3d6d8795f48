"""Megatron's tensors <-> canonical tensors: fused QKV, fused gate/up, tensor shards, padded vocabularies.

This table is the only place that knows how Megatron lays a decoder out. A Megatron parameter is a set of
pieces; a piece is a box of a canonical tensor that lies at a place of the parameter. Filling a live model,
reading a checkpoint and gathering a model all walk the same pieces. No torch and no Megatron here.

Parameters are named with their global layer number: `decoder.layers.7.mlp.linear_fc1.weight`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

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
    """One rank of a tensor-parallel group; (0, 1) is the whole parameter, as in a checkpoint's global view."""

    rank: int = 0
    size: int = 1

    def of(self, length: int) -> tuple[int, int]:
        """This rank's range of a dimension of `length`."""
        part = length // self.size
        return self.rank * part, (self.rank + 1) * part


_NORMS = {
    "self_attention.linear_qkv.layer_norm": "input_norm",
    "input_layernorm.": "input_norm",
    "mlp.linear_fc1.layer_norm": "pre_mlp_norm",
    "pre_mlp_layernorm.": "pre_mlp_norm",
    "self_attention.q_layernorm.": "q_norm",
    "self_attention.k_layernorm.": "k_norm",
}
_LAYERS = "decoder.layers."


def pieces(parameter: str, architecture: Architecture, shard: Shard = Shard()) -> list[Piece]:
    """What `parameter` of this tensor-parallel rank is made of; empty for extra state.

    Rows of a padded vocabulary lie in no piece. Raises InputError for a parameter that nothing claims.
    """
    if parameter.endswith("_extra_state"):
        return []
    if parameter.startswith(_LAYERS):
        layer, local = parameter.removeprefix(_LAYERS).split(".", 1)
        found = list(_of_layer(local, f"layers.{layer}.", architecture, shard))
    else:
        found = list(_outside(parameter, architecture, shard))
    if not found:
        raise InputError(f"nothing in the canonical mapping claims Megatron's parameter '{parameter}'")
    return found


def _outside(parameter: str, a: Architecture, shard: Shard) -> Iterator[Piece]:
    if parameter.startswith("decoder.final_layernorm."):
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
            width = a.head_dim if norm in ("q_norm", "k_norm") else a.hidden_size
            yield _whole(f"{prefix}{norm}.{part}", (width,))
            return
    columns = ((0, a.hidden_size),) if part == "weight" else ()
    if local == f"self_attention.linear_qkv.{part}":
        yield from _qkv(prefix, part, columns, a, shard)
    elif local == f"mlp.linear_fc1.{part}":
        first, last = shard.of(a.ffn_hidden_size)
        for i, name in enumerate(("gate", "up") if a.gated_mlp else ("up",)):
            at = i * (last - first)
            place = ((at, at + last - first), *columns)
            yield Piece(f"{prefix}{name}.{part}", ((first, last), *columns), place)
    elif local.startswith(("self_attention.linear_proj.", "mlp.linear_fc2.")):
        name, length = ("o", a.num_attention_heads * a.head_dim) if "proj" in local else ("down", a.ffn_hidden_size)
        if part == "bias":
            yield _whole(f"{prefix}{name}.bias", (a.hidden_size,))
        else:
            first, last = shard.of(length)
            rows = (0, a.hidden_size)
            yield Piece(f"{prefix}{name}.weight", (rows, (first, last)), (rows, (0, last - first)))


def _qkv(prefix: str, part: str, columns: Box, a: Architecture, shard: Shard) -> Iterator[Piece]:
    """Rows of fused QKV are [group][its query heads, key, value], whole groups on each rank."""
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
    """The smallest multiple of `tp` that holds the vocabulary: what a model of this layout is built with."""
    return -(-vocab_size // tp) * tp
