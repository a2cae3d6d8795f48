"""The sizes of a decoder, and what follows from them alone: tensors, parameters, memory, FLOPs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_minitron.errors import InputError, nearest

NORMALIZATIONS = ("rmsnorm", "layernorm")
BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes of a dense decoder, in Megatron's field names.

    `ffn_hidden_size` is the width of one branch of a gated MLP; `normalization="layernorm"` has a bias;
    `vocab_size` is the true one (the Hugging Face config's), never a padded one.

    Raises InputError where sizes contradict each other.
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

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"{field.name} is {value!r}; it must be a whole number of at least 1")
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

    # -- what is in the model ------------------------------------------------------------------------
    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical tensor name -> global, unfused, unpadded shape; the whole model, in order."""
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (self.vocab_size, self.hidden_size)}
        layer = dict(self._layer_shapes())
        for index in range(self.num_layers):
            shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
        shapes |= dict(self._norm("final_norm", self.hidden_size))
        if not self.tied_embeddings:
            shapes["head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def _layer_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden, ffn = self.hidden_size, self.ffn_hidden_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_query_groups * self.head_dim
        yield from self._norm("input_norm", hidden)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            yield from _linear(name, rows, hidden, self.qkv_bias)
        if self.qk_norm:
            yield "q_norm.weight", (self.head_dim,)
            yield "k_norm.weight", (self.head_dim,)
        yield from _linear("o", hidden, q, self.attention_output_bias)
        yield from self._norm("pre_mlp_norm", hidden)
        for name in ("gate", "up") if self.gated_mlp else ("up",):
            yield from _linear(name, ffn, hidden, self.mlp_bias)
        yield from _linear("down", hidden, ffn, self.mlp_bias)

    def _norm(self, name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (width,)
        if self.normalization == "layernorm":
            yield f"{name}.bias", (width,)

    # -- what it costs -------------------------------------------------------------------------------
    def parameters(self, embeddings: bool = True) -> int:
        """Exact parameter count, as in the HF folder; `embeddings=False` leaves out input embedding and head."""
        outside = () if embeddings else ("embedding.weight", "head.weight")
        return sum(math.prod(shape) for name, shape in self.shapes().items() if name not in outside)

    def memory(self, *, batch: int, context: int, weights: str = "bf16", kv_cache: str = "bf16") -> int:
        """Bytes to serve: weights and the KV cache of `batch` sequences of `context` tokens.

        Under fp8 the matrices of the layers take one byte; embedding, head and norms stay in bf16.
        """
        size, cache = _bytes_of(weights), _bytes_of(kv_cache)
        matrices = sum(
            math.prod(shape) for name, shape in self.shapes().items() if name.startswith("layers.") and len(shape) == 2
        )
        kept = max(size, BYTES["bf16"])
        keys_and_values = 2 * self.num_layers * self.num_query_groups * self.head_dim * batch * context
        return matrices * size + (self.parameters() - matrices) * kept + keys_and_values * cache

    def flops_per_token(self, context: int = 1) -> int:
        """Forward FLOPs of one token at position `context`: two per matrix element, and attention's."""
        matrices = sum(
            math.prod(shape) for name, shape in self.shapes().items() if len(shape) == 2 and name != "embedding.weight"
        )
        head = self.hidden_size * self.vocab_size if self.tied_embeddings else 0
        attention = 2 * self.num_layers * self.num_attention_heads * self.head_dim * context
        return 2 * (matrices + head + attention)

    def activations(self, *, batch: int, context: int, bytes_per_value: int = 2) -> int:
        """Bytes of activations that a training step keeps on one device, without recomputation.

        Counted per token and layer: the residual stream and both norms' outputs, q, k, v, attention's
        output, the MLP's branches and their product; then logits and their gradient in the same dtype.
        """
        qkv = (self.num_attention_heads + 2 * self.num_query_groups) * self.head_dim
        mlp = (3 if self.gated_mlp else 2) * self.ffn_hidden_size
        layer = 4 * self.hidden_size + qkv + self.num_attention_heads * self.head_dim + mlp
        return batch * context * bytes_per_value * (self.num_layers * layer + 2 * self.vocab_size)

    # -- plain values --------------------------------------------------------------------------------
    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

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
        return cls(**values)

    def replace(self, **sizes: Any) -> Architecture:
        return dataclasses.replace(self, **sizes)


def _linear(name: str, rows: int, columns: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _bytes_of(dtype: str) -> int:
    if dtype not in BYTES:
        raise InputError(f"dtype '{dtype}' is unknown; {nearest(dtype, BYTES)}")
    return BYTES[dtype]
