"""Hybrids of Mamba-2, attention and MLP layers: their pattern, a Mamba layer's tensors, and what it costs.

A hybrid's layer is one of three kinds, in Megatron's symbols. Each has one norm in front of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from nemo_minitron.errors import InputError

MAMBA, ATTENTION, MLP = "M", "*", "-"
KINDS = {MAMBA: "mamba", ATTENTION: "attention", MLP: "mlp"}
COUNTS = {f"{kind}_layers": symbol for symbol, kind in KINDS.items()}  # what `keep` calls a number of layers of a kind
SIZES = ("mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim")
FIELDS = ("hybrid_pattern", *SIZES)
STAGES = (  # those that are proven for a hybrid
    "rotate", "estimate", "plan", "compensate", "prune", "prune with extras", "distill", "finetune", "cache-logits",
    "evaluate", "chat", "serving", "compress", "writing a checkpoint", "reading a checkpoint",
)  # fmt: skip
KERNEL = 4  # positions that the convolution sees; Megatron's configs have no place for another number
STATE_BYTES = 4  # transformers and vLLM keep Mamba's states in fp32


class Sizes(Protocol):
    """The sizes of an Architecture that a Mamba layer has."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def mamba_num_heads(self) -> int | None: ...
    @property
    def mamba_head_dim(self) -> int | None: ...
    @property
    def mamba_num_groups(self) -> int | None: ...
    @property
    def mamba_state_dim(self) -> int | None: ...


def check(values: Mapping[str, Any], layers: int) -> None:
    """Raises InputError if an Architecture's FIELDS contradict each other."""
    pattern = values["hybrid_pattern"]
    sizes = {name: values[name] for name in SIZES}
    if pattern is None:
        for name, size in sizes.items():
            if size is not None:
                raise InputError(f"{name} is {size}, which needs a hybrid_pattern")
        return
    if not isinstance(pattern, str) or len(pattern) != layers or not set(pattern) <= KINDS.keys():
        raise InputError(
            f"hybrid_pattern is {pattern!r}; legal is a string of {layers} symbols, one for each layer: "
            f"{', '.join(f'{symbol} ({kind})' for symbol, kind in KINDS.items())}"
        )
    missing = [name for name, size in sizes.items() if size is None]
    if missing:
        raise InputError(f"a model with a hybrid_pattern needs {', '.join(missing)}")
    heads, groups = sizes["mamba_num_heads"], sizes["mamba_num_groups"]
    if heads % groups:
        raise InputError(
            f"{heads} Mamba heads do not divide into {groups} groups; the nearest legal number of heads is "
            f"{max(1, round(heads / groups)) * groups}"
        )


def check_stage(pattern: str | None, stage: str) -> None:
    """Raises InputError for a stage of the method, or a part of one, that a model with this pattern does not have."""
    if pattern and stage not in STAGES:
        raise InputError(f"{stage} is not supported for a hybrid with Mamba; legal are {', '.join(STAGES)}")


def inner(a: Sizes) -> int:
    """The channels of all heads of a Mamba layer."""
    return (a.mamba_num_heads or 0) * (a.mamba_head_dim or 0)


def states(a: Sizes) -> int:
    """The channels of the states of all groups, of B and of C each."""
    return (a.mamba_num_groups or 0) * (a.mamba_state_dim or 0)


def shapes(a: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Canonical tensors of a Mamba layer, without its norm: the parts of the input projection z, x, b (B), c (C) and
    dt, the convolution of each of x, b and c, the heads' own numbers, the gated norm and the output projection."""
    widths = {"z": inner(a), "x": inner(a), "b": states(a), "c": states(a), "dt": a.mamba_num_heads or 0}
    for name, width in widths.items():
        yield f"{name}.weight", (width, a.hidden_size)
    for name in ("x", "b", "c"):
        yield f"{name}_conv.weight", (widths[name], 1, KERNEL)
        yield f"{name}_conv.bias", (widths[name],)
    for name in ("dt.bias", "a_log", "d"):
        yield name, (widths["dt"],)
    yield "gated_norm.weight", (inner(a),)
    yield "out.weight", (a.hidden_size, inner(a))


def cache(a: Sizes, size: int) -> int:
    """Bytes that one Mamba layer keeps of a sequence, whatever its length; `size`: bytes of an element of the
    convolution's part."""
    return inner(a) * (a.mamba_state_dim or 0) * STATE_BYTES + (inner(a) + 2 * states(a)) * KERNEL * size


def multiplications(a: Sizes) -> int:
    """What one token multiplies in one Mamba layer beside the projections: the convolution, and for each element of
    the state its decay, what is added and what is read."""
    return (inner(a) + 2 * states(a)) * KERNEL + 3 * inner(a) * (a.mamba_state_dim or 0)
