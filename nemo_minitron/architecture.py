"""The sizes of a decoder, and what follows from them alone: tensors, parameters, memory, FLOPs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nemo_minitron.errors import InputError, nearest

NORMALIZATIONS = ("rmsnorm", "layernorm")
BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
MOST = {"num_layers": 10_000, "num_moe_experts": 10_000}  # upper bounds; the number of tensors grows with these sizes
MOST_EXPERTS = 1_000_000  # upper bound over all layers; each expert has its own tensors
MOST_SIZE = 2**31 - 1  # upper bound of every other size
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes of a decoder, in Megatron's field names.

    `ffn_hidden_size` is the width of one branch of a gated MLP; `normalization="layernorm"` has a bias;
    `vocab_size` is the true one (the Hugging Face config's), never a padded one.

    A mixture of experts has `num_moe_experts` (None or 0: dense), in the layers that `moe_layer_freq` marks:
    one 0 or 1 a layer, or as in Megatron an N for every N-th layer, from the first. `moe_ffn_hidden_size` is an
    expert's width (None: `ffn_hidden_size`), `moe_shared_expert_intermediate_size` the shared expert's (None:
    there is none), `moe_shared_expert_gate` says that the shared expert's output is gated. Where every layer is
    a mixture, `ffn_hidden_size` is the expert's width too. The constructor fills in all of these
    fields, so that equal models compare equal.

    Raises InputError if sizes contradict each other.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    gated_mlp: bool = True
    tied_embeddings: bool = False
    normalization: str = "rmsnorm"
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    num_moe_experts: int | None = None
    moe_router_topk: int = 2
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False
    moe_layer_freq: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_moe_experts", self.num_moe_experts or None)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            sized = field.type == "int" or (field.type == "int | None" and value is not None)
            if sized and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"{field.name} is {value!r}; it must be a whole number of at least 1")
            if sized and value > (most := MOST.get(field.name, MOST_SIZE)):
                raise InputError(f"{field.name} is {value}; legal are 1 to {most}")
            if field.type == "bool" and not isinstance(value, bool):
                raise InputError(f"{field.name} is {value!r}; it must be true or false")
        if self.num_attention_heads % self.num_query_groups:
            raise InputError(
                f"{self.num_attention_heads} attention heads do not divide into {self.num_query_groups} "
                f"query groups; the nearest legal number of heads is "
                f"{max(1, round(self.num_attention_heads / self.num_query_groups)) * self.num_query_groups}"
            )
        if self.normalization not in NORMALIZATIONS:
            raise InputError(
                f"normalization '{self.normalization}' is unknown; {nearest(self.normalization, NORMALIZATIONS)}"
            )
        for name, value in (self._mixture() if self.num_moe_experts else self._dense()).items():
            object.__setattr__(self, name, value)

    def _dense(self) -> dict[str, Any]:
        for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
            if getattr(self, name) is not None:
                raise InputError(f"{name} is {getattr(self, name)}, which needs num_moe_experts of at least 1")
        return {name: _DENSE[name] for name in MOE_FIELDS}

    def _mixture(self) -> dict[str, Any]:
        experts = self.num_moe_experts or 0
        if self.num_layers * experts > MOST_EXPERTS:
            raise InputError(
                f"{self.num_layers} layers of {experts} experts are {self.num_layers * experts}; legal are 1 to "
                f"{MOST_EXPERTS}"
            )
        if self.moe_router_topk > experts:
            raise InputError(
                f"moe_router_topk is {self.moe_router_topk} of {experts} experts; the nearest legal one is {experts}"
            )
        if self.mlp_bias:
            raise InputError("experts with biases are not supported; mlp_bias must be False in a mixture of experts")
        if self.moe_shared_expert_gate and not self.moe_shared_expert_intermediate_size:
            raise InputError("moe_shared_expert_gate is set, but there is no shared expert; leave it False")
        pattern = _pattern(self.moe_layer_freq, self.num_layers)
        width = self.moe_ffn_hidden_size or self.ffn_hidden_size
        every = all(pattern)
        return {
            "moe_layer_freq": 1 if every else pattern,
            "moe_ffn_hidden_size": width,
            "ffn_hidden_size": width if every else self.ffn_hidden_size,
        }

    # -- what is in the model ------------------------------------------------------------------------
    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers whose MLP is a mixture of experts."""
        if not self.num_moe_experts:
            return ()
        return tuple(i for i, moe in enumerate(_pattern(self.moe_layer_freq, self.num_layers)) if moe)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """The layers whose MLP is not a mixture of experts."""
        return tuple(sorted(set(range(self.num_layers)) - set(self.moe_layers)))

    def keep_layers(self, kept: Sequence[int]) -> Architecture:
        """The architecture with only the layers `kept` (sorted); each layer stays a mixture, or dense, as it was."""
        pattern = tuple(int(layer in self.moe_layers) for layer in kept)
        if self.num_moe_experts and not any(pattern):
            return self.replace(num_layers=len(kept), **{name: _DENSE[name] for name in MOE_FIELDS})
        return self.replace(num_layers=len(kept), moe_layer_freq=pattern if any(pattern) else 1)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical tensor name -> global, unfused, unpadded shape; the whole model, in order."""
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (self.vocab_size, self.hidden_size)}
        attention, mixtures = dict(self._attention_shapes()), set(self.moe_layers)
        dense, moe = dict(self._mlp("", self.ffn_hidden_size)), dict(self._moe_shapes())
        for index in range(self.num_layers):
            layer = attention | (moe if index in mixtures else dense)
            shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
        shapes |= dict(self._norm("final_norm", self.hidden_size))
        if not self.tied_embeddings:
            shapes["head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def _attention_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Attention's tensors, and the norms on both sides of it."""
        hidden = self.hidden_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_query_groups * self.head_dim
        yield from self._norm("input_norm", hidden)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            yield from _linear(name, rows, hidden, self.qkv_bias)
        if self.qk_norm:
            yield "q_norm.weight", (self.head_dim,)
            yield "k_norm.weight", (self.head_dim,)
        yield from _linear("o", hidden, q, self.attention_output_bias)
        yield from self._norm("pre_mlp_norm", hidden)

    def _mlp(self, prefix: str, ffn: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name in ("gate", "up") if self.gated_mlp else ("up",):
            yield from _linear(f"{prefix}{name}", ffn, self.hidden_size, self.mlp_bias)
        yield from _linear(f"{prefix}down", self.hidden_size, ffn, self.mlp_bias)

    def _moe_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "router.weight", (self.num_moe_experts or 0, self.hidden_size)
        for expert in range(self.num_moe_experts or 0):
            yield from self._mlp(f"experts.{expert}.", self.moe_ffn_hidden_size or 0)
        if self.moe_shared_expert_intermediate_size:
            yield from self._mlp("shared_expert.", self.moe_shared_expert_intermediate_size)
            if self.moe_shared_expert_gate:
                yield "shared_expert.router.weight", (1, self.hidden_size)

    def _norm(self, name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (width,)
        if self.normalization == "layernorm":
            yield f"{name}.bias", (width,)

    # -- what it costs -------------------------------------------------------------------------------
    def parameters(self, embeddings: bool = True, active: bool = False) -> int:
        """Exact parameter count, as in the HF folder; `embeddings=False` leaves out input embedding and head.

        `active=True` counts only the parameters that work on one token; a token goes to `moe_router_topk` experts.
        """
        outside = () if embeddings else ("embedding.weight", "head.weight")
        shapes = self._active_shapes() if active else self.shapes()
        return sum(math.prod(shape) for name, shape in shapes.items() if name not in outside)

    def _active_shapes(self) -> dict[str, tuple[int, ...]]:
        """`shapes()` with only `moe_router_topk` experts a layer, which is what one token uses; all experts are
        alike."""
        return {name: shape for name, shape in self.shapes().items() if _expert_of(name) < self.moe_router_topk}

    def memory(self, *, batch: int, context: int, weights: str = "bf16", kv_cache: str = "bf16") -> int:
        """Bytes to serve: all weights and the KV cache of `batch` sequences of `context` tokens.

        Under fp8 the matrices of the layers take one byte; embedding, head, norms and routers stay in bf16.
        """
        size, cache = _bytes_of(weights), _bytes_of(kv_cache)
        matrices = sum(
            math.prod(shape)
            for name, shape in self.shapes().items()
            if name.startswith("layers.") and len(shape) == 2 and not name.endswith("router.weight")
        )
        kept = max(size, BYTES["bf16"])
        keys_and_values = 2 * self.num_layers * self.num_query_groups * self.head_dim * batch * context
        return matrices * size + (self.parameters() - matrices) * kept + keys_and_values * cache

    def flops_per_token(self, context: int = 1) -> int:
        """Forward FLOPs of one token at position `context`: two per element of each matrix that works on the token,
        plus those of attention."""
        matrices = sum(
            math.prod(shape)
            for name, shape in self._active_shapes().items()
            if len(shape) == 2 and name != "embedding.weight"
        )
        head = self.hidden_size * self.vocab_size if self.tied_embeddings else 0
        attention = 2 * self.num_layers * self.num_attention_heads * self.head_dim * context
        return 2 * (matrices + head + attention)

    # -- plain values --------------------------------------------------------------------------------
    def as_dict(self) -> dict[str, Any]:
        """All fields as plain values; those of a dense model leave out MOE_FIELDS."""
        values = dataclasses.asdict(self)
        return values if self.num_moe_experts else {n: v for n, v in values.items() if n not in MOE_FIELDS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Architecture:
        """Raises InputError for a field that does not exist (with the nearest) or one that is missing."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise InputError(f"an architecture has no field '{name}'; {nearest(name, fields)}")
        missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
        if missing:
            raise InputError(f"an architecture needs {', '.join(missing)}")
        freq = values.get("moe_layer_freq", 1)
        return cls(**{**values, "moe_layer_freq": tuple(freq) if isinstance(freq, list) else freq})

    def replace(self, **sizes: Any) -> Architecture:
        return dataclasses.replace(self, **sizes)


_DENSE = {f.name: f.default for f in dataclasses.fields(Architecture) if "moe_" in f.name}
MOE_FIELDS = tuple(_DENSE)


def _pattern(freq: Any, layers: int) -> tuple[int, ...]:
    """Megatron's `moe_layer_freq` -> one 0 (dense) or 1 (mixture) a layer. Raises InputError."""
    if isinstance(freq, int) and not isinstance(freq, bool) and freq >= 1:
        return tuple(int(layer % freq == 0) for layer in range(layers))
    if not isinstance(freq, tuple) or len(freq) != layers or not set(freq) <= {0, 1} or not any(freq):
        raise InputError(
            f"moe_layer_freq is {freq!r}; legal is a whole number of at least 1, or a 0 or 1 for each of the "
            f"{layers} layers with at least one 1, the nearest is 1"
        )
    return freq


def _expert_of(name: str) -> int:
    """The number of the expert that a canonical tensor belongs to; -1 for a tensor that every token uses."""
    match = _EXPERT.search(name)
    return int(match[1]) if match else -1


def _linear(name: str, rows: int, columns: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _bytes_of(dtype: str) -> int:
    if dtype not in BYTES:
        raise InputError(f"dtype '{dtype}' is unknown; {nearest(dtype, BYTES)}")
    return BYTES[dtype]
