"""What can be cut, and which tensors must be cut together, as a table.

A row (tensor, dim, unit) says that an axis owns dimension `dim` of a canonical tensor, in steps of
`unit` consecutive indices (1, or the head dimension). An axis that is `per_layer` keeps its own indices in
each source layer; the others keep one set for the whole model. `head_dim` itself is no axis: cutting it
would change the rotary frequencies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nemo_minitron.errors import InputError, nearest

if TYPE_CHECKING:
    from nemo_minitron.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Row:
    """One dimension of one canonical tensor (without its `layers.N.` prefix)."""

    tensor: str
    dim: int
    unit: str = "1"


@dataclasses.dataclass(frozen=True)
class Axis:
    """`size`: the Architecture field it changes; `order`: how its candidates are ranked against each other."""

    name: str
    size: str
    rows: tuple[Row, ...]
    per_layer: bool = False
    order: str = "over the whole model"

    def length(self, architecture: Architecture) -> int:
        return getattr(architecture, self.size)


def _rows(dim: int, *tensors: str, unit: str = "1") -> tuple[Row, ...]:
    return tuple(Row(tensor, dim, unit) for tensor in tensors)


_BRANCHES = ("gate", "up")
_NORMS = ("input_norm", "pre_mlp_norm", "final_norm")

AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis("layers", "num_layers", ()),
        Axis(
            "hidden",
            "hidden_size",
            _rows(1, "embedding.weight", "head.weight", *(f"{name}.weight" for name in ("q", "k", "v", *_BRANCHES)))
            + _rows(0, "o.weight", "o.bias", "down.weight", "down.bias")
            + _rows(0, *(f"{norm}.{part}" for norm in _NORMS for part in ("weight", "bias"))),
        ),
        Axis(
            "ffn",
            "ffn_hidden_size",
            _rows(0, *(f"{name}.{part}" for name in _BRANCHES for part in ("weight", "bias")))
            + _rows(1, "down.weight"),
            per_layer=True,
            order="within a layer",
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
        Axis("vocab", "vocab_size", _rows(0, "embedding.weight", "head.weight")),
    )
}


def axis(name: str) -> Axis:
    """Raises InputError for an unknown name, with the nearest."""
    if name not in AXES:
        raise InputError(f"there is no axis '{name}'; {nearest(name, AXES)}")
    return AXES[name]


def split_name(tensor: str) -> tuple[int | None, str]:
    """`layers.3.q.weight` -> (3, `q.weight`); `final_norm.weight` -> (None, `final_norm.weight`)."""
    if not tensor.startswith("layers."):
        return None, tensor
    _, layer, rest = tensor.split(".", 2)
    return int(layer), rest


def owners(tensor: str) -> Iterator[tuple[Axis, Row]]:
    """The axes that own a dimension of this canonical tensor, with the row that says so."""
    _, local = split_name(tensor)
    for candidate in AXES.values():
        for row in candidate.rows:
            if row.tensor == local:
                yield candidate, row
