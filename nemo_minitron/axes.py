"""What can be cut, and which tensors must be cut together, as a table.

A row (tensor, dim, unit) says that an axis owns dimension `dim` of a canonical tensor, in steps of `unit` consecutive
indices (1, or the head dimension). An axis that is `per_layer` keeps its own indices in each source layer, and one that
is `per_expert` in each expert of a layer. The others keep one set for the whole model. `head_dim` itself is no axis,
because a cut would change the rotary frequencies. A unit of the axis `experts` is a row of the router and the whole
expert. `{e}` in the name of a tensor stands for the number of the expert.
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
    """One dimension of one canonical tensor (without its `layers.N.` prefix, `{e}` for an expert's number)."""

    tensor: str
    dim: int
    unit: str = "1"


@dataclasses.dataclass(frozen=True)
class Axis:
    """`size`: the Architecture's field that it changes. `order`: the units that are ranked against each other.
    `layers`:
    the Architecture's property that lists the layers which have the axis (None: all)."""

    name: str
    size: str
    rows: tuple[Row, ...]
    per_layer: bool = False
    order: str = "over the whole model"
    per_expert: bool = False
    layers: str | None = None

    def length(self, architecture: Architecture) -> int:
        """The number of its units, for each layer if it is `per_layer`. 0 in a model that lacks it."""
        return (getattr(architecture, self.size) or 0) if self.layers_of(architecture) else 0

    def layers_of(self, architecture: Architecture) -> Sequence[int]:
        """The layers that have the axis."""
        return range(architecture.num_layers) if self.layers is None else getattr(architecture, self.layers)


def _rows(dim: int, *tensors: str, unit: str = "1") -> tuple[Row, ...]:
    return tuple(Row(tensor, dim, unit) for tensor in tensors)


_BRANCHES = ("gate", "up")
_EXPERT, _SHARED = "experts.{e}.", "shared_expert."
_INTO = tuple(f"{mlp}{branch}.weight" for mlp in ("", _EXPERT, _SHARED) for branch in _BRANCHES)
_OUT_OF = tuple(f"{mlp}down.weight" for mlp in ("", _EXPERT, _SHARED))
_NORMS = ("input_norm", "pre_mlp_norm", "final_norm")

AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis("layers", "num_layers", ()),
        Axis(
            "hidden",
            "hidden_size",
            _rows(1, "embedding.weight", "head.weight", "q.weight", "k.weight", "v.weight", *_INTO)
            + _rows(1, "router.weight", "shared_expert.router.weight")
            + _rows(0, "o.weight", "o.bias", "down.bias", *_OUT_OF)
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
            _rows(0, "q.weight", "q.bias", unit="head_dim") + _rows(1, "o.weight", unit="head_dim"),
            per_layer=True,
            order="within a query group of a layer",
        ),
        Axis(
            "query_groups",
            "num_query_groups",
            _rows(0, "k.weight", "k.bias", "v.weight", "v.bias", unit="head_dim"),
            per_layer=True,
            order="within a layer",
        ),
        Axis(
            "experts",
            "num_moe_experts",
            _rows(0, "router.weight"),
            per_layer=True,
            order="within a layer",
            layers="moe_layers",
        ),
        Axis(
            "expert_ffn",
            "moe_ffn_hidden_size",
            _rows(0, *(f"{_EXPERT}{name}.weight" for name in _BRANCHES)) + _rows(1, f"{_EXPERT}down.weight"),
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
