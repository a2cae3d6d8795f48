"""What can be cut, and which tensors must be cut together, as a table.

A row (tensor, dim, unit) says that an axis owns dimension `dim` of a canonical tensor, in steps of `unit` consecutive
indices (1, or a head's dimension). Two axes may own one dimension: Mamba's heads, and the channels that stay in each of
these heads, so that the kept positions are those that both keep. An axis that is `per_layer` keeps its own indices in
each source layer, and one that is `per_expert` in each expert of a layer. The others keep one set for the whole model.
`head_dim` itself is no axis, because a cut would change the rotary frequencies. A unit of the axis `experts` is a row
of the router and the whole expert. `{e}` in the name of a tensor stands for the number of the expert.

`experts_per_token` owns no tensor: its units are the places in the order in which the router ranks a token's experts.
The first places stay, so it is not `ranked` by importance.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from nemo_minitron.errors import InputError, nearest

if TYPE_CHECKING:
    from nemo_minitron.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Row:
    """One dimension of one canonical tensor (without its `layers.N.` prefix, `{e}` for an expert's number).

    `unit`: the Architecture's field that says how many consecutive indices a unit of the axis is, or "1". `each`: the
    field that says how often the axis is repeated along the dimension, or "1".
    """

    tensor: str
    dim: int
    unit: str = "1"
    each: str = "1"

    def sizes(self, architecture: Architecture) -> tuple[int, int]:
        """(Consecutive indices of a unit, repetitions of the axis.)"""
        unit, each = (1 if name == "1" else getattr(architecture, name) or 0 for name in (self.unit, self.each))
        return unit, each


@dataclasses.dataclass(frozen=True)
class Axis:
    """`size`: the Architecture's field that it changes. `order`: the units that are ranked against each other; without
    `ranked` the first units stay. `layers`: the Architecture's property that lists the layers which have the axis
    (None: all)."""

    name: str
    size: str
    rows: tuple[Row, ...]
    per_layer: bool = False
    order: str = "over the whole model"
    per_expert: bool = False
    layers: str | None = None
    ranked: bool = True

    def length(self, architecture: Architecture) -> int:
        """The number of its units, for each layer if it is `per_layer`. 0 in a model that lacks it."""
        return (getattr(architecture, self.size) or 0) if self.layers_of(architecture) else 0

    def layers_of(self, architecture: Architecture) -> Sequence[int]:
        """The layers that have the axis."""
        return range(architecture.num_layers) if self.layers is None else getattr(architecture, self.layers)


def _rows(dim: int, *tensors: str, unit: str = "1", each: str = "1") -> tuple[Row, ...]:
    return tuple(Row(tensor, dim, unit, each) for tensor in tensors)


def _of_mamba_heads(**sizes: str) -> tuple[Row, ...]:
    """The rows of what has all channels of all Mamba heads along a dimension."""
    rows = ("z.weight", "x.weight", "x_conv.weight", "x_conv.bias", "gated_norm.weight")
    return _rows(0, *rows, **sizes) + _rows(1, "out.weight", **sizes)


_BRANCHES = ("gate", "up")
_EXPERT, _SHARED = "experts.{e}.", "shared_expert."
_INTO = tuple(f"{mlp}{branch}.weight" for mlp in ("", _EXPERT, _SHARED) for branch in _BRANCHES)
_OUT_OF = tuple(f"{mlp}down.weight" for mlp in ("", _EXPERT, _SHARED))
_INTO_MAMBA = tuple(f"{part}.weight" for part in ("z", "x", "b", "c", "dt"))
_INTO_LATENTS = ("q_down.weight", "kv_down.weight", "k_rope.weight")
_NORMS = ("input_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm", "final_norm")

AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis("layers", "num_layers", ()),
        Axis(
            "hidden",
            "hidden_size",
            _rows(1, "embedding.weight", "head.weight", "q.weight", "k.weight", "v.weight", *_INTO)
            + _rows(1, "router.weight", "shared_expert.router.weight", *_INTO_MAMBA, *_INTO_LATENTS)
            + _rows(0, "o.weight", "o.bias", "down.bias", f"{_EXPERT}down.bias", "out.weight", *_OUT_OF)
            + _rows(0, *(f"{norm}.{part}" for norm in _NORMS for part in ("weight", "bias"))),
        ),
        Axis(
            "ffn",
            "ffn_hidden_size",
            _rows(0, *(f"{name}.{part}" for name in _BRANCHES for part in ("weight", "bias")))
            + _rows(1, "down.weight"),
            per_layer=True,
            order="within a layer",
            layers="dense_layers",
        ),
        Axis(
            "heads",
            "num_attention_heads",
            _rows(0, "q.weight", "q.bias", "q_up.weight", unit="head_dim")
            + _rows(0, "kv_up.weight", unit="key_value_dim")
            + _rows(1, "o.weight", unit="value_dim")
            + _rows(0, "sinks"),
            per_layer=True,
            order="within a query group of a layer",
            layers="attention_layers",
        ),
        Axis(
            "query_groups",
            "num_query_groups",
            _rows(0, "k.weight", "k.bias", "v.weight", "v.bias", unit="head_dim"),
            per_layer=True,
            order="within a layer",
            layers="grouped_layers",
        ),
        Axis(
            "q_latent",
            "q_lora_rank",
            _rows(0, "q_down.weight", "q_latent_norm.weight") + _rows(1, "q_up.weight"),
            per_layer=True,
            order="within a layer",
        ),
        Axis(
            "kv_latent",
            "kv_lora_rank",
            _rows(0, "kv_down.weight", "kv_latent_norm.weight") + _rows(1, "kv_up.weight"),
            per_layer=True,
            order="within a layer",
        ),
        Axis(
            "mamba_heads",
            "mamba_num_heads",
            _rows(0, "dt.weight", "dt.bias", "a_log", "d") + _of_mamba_heads(unit="mamba_head_dim"),
            per_layer=True,
            order="within a group of a layer",
            layers="mamba_layers",
        ),
        Axis(
            "mamba_head_dim",
            "mamba_head_dim",
            _of_mamba_heads(each="mamba_num_heads"),
            per_layer=True,
            order="within a layer, the same in each head",
            layers="mamba_layers",
        ),
        Axis(
            "experts",
            "num_moe_experts",
            _rows(0, "router.weight", "router.bias", "router.expert_bias"),
            per_layer=True,
            order="within a layer, or within a router's group of it",
            layers="moe_layers",
        ),
        Axis(
            "experts_per_token",
            "moe_router_topk",
            (),
            order="by each token's router",
            layers="moe_layers",
            ranked=False,
        ),
        Axis(
            "expert_ffn",
            "moe_ffn_hidden_size",
            _rows(0, *(f"{_EXPERT}{name}.{part}" for name in _BRANCHES for part in ("weight", "bias")))
            + _rows(1, f"{_EXPERT}down.weight"),
            per_layer=True,
            order="within an expert of a layer",
            per_expert=True,
            layers="moe_layers",
        ),
        Axis(
            "shared_expert_ffn",
            "moe_shared_expert_intermediate_size",
            _rows(0, *(f"{_SHARED}{name}.weight" for name in _BRANCHES)) + _rows(1, f"{_SHARED}down.weight"),
            per_layer=True,
            order="within a layer",
            layers="moe_layers",
        ),
        Axis("vocab", "vocab_size", _rows(0, "embedding.weight", "head.weight")),
    )
}


def axis(name: str) -> Axis:
    """The axis of this name. Raises InputError for an unknown name, with the nearest one."""
    if name not in AXES:
        raise InputError(f"there is no axis '{name}'; {nearest(name, AXES)}")
    return AXES[name]


def split_name(tensor: str) -> tuple[int | None, str]:
    """`layers.3.q.weight` -> (3, `q.weight`); `final_norm.weight` -> (None, `final_norm.weight`)."""
    if not tensor.startswith("layers."):
        return None, tensor
    _, layer, rest = tensor.split(".", 2)
    return int(layer), rest


# Tensors that write to the residual stream: they have the hidden channels as their rows, and are no norms.
WRITERS = frozenset(row.tensor for row in AXES["hidden"].rows if row.dim == 0 and "norm" not in row.tensor)


def split_expert(local: str) -> tuple[int | None, str]:
    """`experts.5.gate.weight` -> (5, `experts.{e}.gate.weight`); `gate.weight` -> (None, `gate.weight`)."""
    match = re.fullmatch(r"experts\.(\d+)\.(.*)", local)
    return (int(match[1]), f"experts.{{e}}.{match[2]}") if match else (None, local)


def owners(tensor: str) -> Iterator[tuple[Axis, Row]]:
    """The axes that own a dimension of this canonical tensor, with the row that says so."""
    _, local = split_expert(split_name(tensor)[1])
    for candidate in AXES.values():
        for row in candidate.rows:
            if row.tensor == local:
                yield candidate, row
