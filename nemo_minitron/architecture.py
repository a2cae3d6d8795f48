"""The sizes of a decoder, and what follows from them alone: tensors, parameters, memory, FLOPs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_minitron import hybrid, latents, layer_shapes, mixture, windows
from nemo_minitron.errors import InputError, nearest

NORMALIZATIONS = ("rmsnorm", "layernorm")
BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
MOST = {"num_layers": 10_000, "num_moe_experts": 10_000}  # upper bounds; the number of tensors grows with these sizes
MOST_SIZE = 2**31 - 1  # upper bound of every other size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes of a decoder, in Megatron's field names.

    `ffn_hidden_size` is the width of one branch of a gated MLP; `normalization="layernorm"` has a bias;
    `vocab_size` is the true one (the Hugging Face config's), never a padded one.

    A mixture of experts has `num_moe_experts` (None or 0: dense), in the layers that `moe_layer_freq` marks:
    one 0 or 1 a layer, or as in Megatron an N for every N-th layer, from the first. `moe_ffn_hidden_size` is an
    expert's width (None: `ffn_hidden_size`), `moe_shared_expert_intermediate_size` the shared expert's (None:
    there is none), `moe_shared_expert_gate` says that the shared expert's output is gated. Where every layer is
    a mixture, `ffn_hidden_size` is the expert's width too. Experts have biases if `mlp_bias` says so, and the
    router one if `moe_router_bias` does. `moe_router_enable_expert_bias`: a number is added to an expert's score when
    experts are chosen, and to nothing else. `moe_router_num_groups`: experts lie in groups, of which a token goes to
    some (None: no groups). The constructor fills in all of these fields, so that equal models compare equal.

    Multi-latent attention has `kv_lora_rank` (None: plain attention), the width of the latent of keys and values,
    `q_lora_rank`, that of queries (None: none), and `qk_pos_emb_head_dim`, the rotary channels of a head, of which the
    key's are the same for all heads. `head_dim` then counts the channels of a query, rotary ones among them, and
    `v_head_dim` those of a value. All heads share one latent, so there is one query group.

    `attention_sinks`: each head has a learned logit beside its scores, which takes a share of the softmax.

    A hybrid has `hybrid_pattern`, a symbol a layer: M (Mamba-2), * (attention) or - (MLP), with `input_norm` each.
    Then `mamba_num_heads`, `mamba_head_dim`, `mamba_num_groups` (of heads that share B and C) and `mamba_state_dim`
    say what a Mamba layer is.

    `post_norms`: a layer also norms what attention and MLP write, before it is added to the residual stream.
    `scaled_embeddings`: the model multiplies embeddings by sqrt(hidden_size). `zero_centered_norms`: a norm of
    RMSNorm multiplies by its weight plus 1. `capped_attention`: scores are capped, so that attention is not fused.
    Gemma 2 has all four, Gemma 3 the first three.

    A layer with a window looks back over `attention_window` tokens, the current one among them (None: no layer has a
    window); `window_attn_skip_freq` has a 1 for each such layer (None: all). They change costs and no tensor, so models
    that differ in nothing else compare equal.

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
    attention_sinks: bool = False
    post_norms: bool = False
    scaled_embeddings: bool = False
    zero_centered_norms: bool = False
    capped_attention: bool = False
    num_moe_experts: int | None = None
    moe_router_topk: int = 2
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False
    moe_router_bias: bool = False
    moe_layer_freq: int | tuple[int, ...] = 1
    moe_router_num_groups: int | None = None
    moe_router_enable_expert_bias: bool = False
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_pos_emb_head_dim: int | None = None
    v_head_dim: int | None = None
    hybrid_pattern: str | None = None
    mamba_num_heads: int | None = None
    mamba_head_dim: int | None = None
    mamba_num_groups: int | None = None
    mamba_state_dim: int | None = None
    attention_window: int | None = dataclasses.field(default=None, compare=False)
    window_attn_skip_freq: tuple[int, ...] | None = dataclasses.field(default=None, compare=False)

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
        hybrid.check({name: getattr(self, name) for name in hybrid.FIELDS}, self.num_layers)
        latents.check(self)
        if self.hybrid_pattern and self.attention_window:
            raise InputError("hybrids with windows are not supported; attention_window must be None in a hybrid")
        if self.post_norms and (self.hybrid_pattern or self.num_moe_experts):
            raise InputError("hybrids and mixtures with norms behind their parts are not supported; post_norms is set")
        spelled = windows.one_spelling(self.attention_window, self.window_attn_skip_freq, self.num_layers)
        layers = mixture.one_spelling(self) if self.num_moe_experts else self._dense()
        for name, value in {**layers, **dict(zip(windows.FIELDS, spelled, strict=True))}.items():
            object.__setattr__(self, name, value)

    def _dense(self) -> dict[str, Any]:
        for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_router_num_groups"):
            if getattr(self, name) is not None:
                raise InputError(f"{name} is {getattr(self, name)}, which needs num_moe_experts of at least 1")
        return {name: _DENSE[name] for name in MOE_FIELDS}

    # -- what is in the model ------------------------------------------------------------------------
    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers whose MLP is a mixture of experts."""
        if not self.num_moe_experts:
            return ()
        return tuple(i for i, moe in enumerate(mixture.pattern_of(self.moe_layer_freq, self.num_layers)) if moe)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """The layers with an MLP that is not a mixture of experts."""
        return tuple(sorted(set(self._layers_of(hybrid.MLP)) - set(self.moe_layers)))

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers with attention."""
        return self._layers_of(hybrid.ATTENTION)

    @property
    def grouped_layers(self) -> tuple[int, ...]:
        """The layers with query groups, each of which has keys and values of its own."""
        return () if self.kv_lora_rank else self.attention_layers

    @property
    def value_dim(self) -> int:
        """The channels of a head's value, and of its output."""
        return self.v_head_dim or self.head_dim

    @property
    def key_value_dim(self) -> int:
        """The channels of a head that are made of a latent: of its key, without rotary ones, and of its value."""
        return self.head_dim - (self.qk_pos_emb_head_dim or 0) + self.value_dim

    @property
    def mamba_layers(self) -> tuple[int, ...]:
        """The layers with a Mamba-2 mixer."""
        return self._layers_of(hybrid.MAMBA) if self.hybrid_pattern else ()

    @property
    def layers_differ(self) -> bool:
        """Whether some layers are of another kind than others, so that a number does not say which ones stay."""
        return isinstance(self.moe_layer_freq, tuple) or bool(self.hybrid_pattern)

    def _layers_of(self, kind: str) -> tuple[int, ...]:
        """The layers of a kind of a hybrid; all layers of another model."""
        pattern = self.hybrid_pattern or kind * self.num_layers
        return tuple(layer for layer, symbol in enumerate(pattern) if symbol == kind)

    def keep_layers(self, kept: Sequence[int]) -> Architecture:
        """The architecture with only the layers `kept` (sorted); each layer stays as it was: of its kind, and with its
        window."""
        if self.hybrid_pattern:
            return self.replace(num_layers=len(kept), hybrid_pattern="".join(self.hybrid_pattern[i] for i in kept))
        pattern, freq = tuple(int(layer in self.moe_layers) for layer in kept), self.window_attn_skip_freq
        of_layers: dict[str, Any] = {
            "attention_window": self.attention_window,
            "moe_layer_freq": pattern if any(pattern) else 1,
        }
        of_layers["window_attn_skip_freq"] = freq and tuple(freq[layer] for layer in kept)
        if self.num_moe_experts and not any(pattern):
            of_layers |= {name: _DENSE[name] for name in MOE_FIELDS}
        return self.replace(num_layers=len(kept), **of_layers)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical tensor name -> global, unfused, unpadded shape; the whole model, in order."""
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (self.vocab_size, self.hidden_size)}
        for index, layer in enumerate(layer_shapes.of_layers(self)):
            shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
        shapes |= layer_shapes.norm(self, "final_norm")
        if not self.tied_embeddings:
            shapes["head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

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
        return {name: shape for name, shape in self.shapes().items() if mixture.expert_of(name) < self.moe_router_topk}

    def memory(self, *, batch: int, context: int, weights: str = "bf16", kv_cache: str = "bf16") -> int:
        """Bytes to serve: all weights and, of `batch` sequences of `context` tokens, the KV cache and Mamba's states; a
        layer with a window keeps no more of the KV cache than its window.

        Under fp8 the matrices of the layers take one byte; embedding, head, norms and routers stay in bf16.
        """
        size, cache = _bytes_of(weights), _bytes_of(kv_cache)
        matrices = sum(
            math.prod(shape)
            for name, shape in self.shapes().items()
            if name.startswith("layers.") and len(shape) == 2 and not name.endswith("router.weight")
        )
        kept = max(size, BYTES["bf16"])
        keys_and_values = self._seen(context) * latents.cached(self) * batch
        states = len(self.mamba_layers) * hybrid.cache(self, cache) * batch
        return matrices * size + (self.parameters() - matrices) * kept + keys_and_values * cache + states

    def flops_per_token(self, context: int = 1) -> int:
        """Forward FLOPs of one token at position `context`: two per element of each matrix that works on the token,
        plus those of attention and of Mamba's scan."""
        matrices = sum(
            math.prod(shape)
            for name, shape in self._active_shapes().items()
            if len(shape) == 2 and name != "embedding.weight"
        )
        head = self.hidden_size * self.vocab_size if self.tied_embeddings else 0
        attention = self._seen(context) * self.num_attention_heads * (self.head_dim + self.value_dim)
        mamba = len(self.mamba_layers) * hybrid.multiplications(self)
        return 2 * (matrices + head + attention + mamba)

    def _seen(self, context: int) -> int:
        return windows.seen(self.attention_window, self.window_attn_skip_freq, len(self.attention_layers), context)

    # -- plain values --------------------------------------------------------------------------------
    def as_dict(self) -> dict[str, Any]:
        """All fields as plain values, without those of mixtures, hybrids, Gemma, windows, latents, sinks and routers'
        biases and groups where there are none."""
        absent = {name for name in (*windows.FIELDS, *latents.FIELDS) if getattr(self, name) is None}
        absent |= {name for name in ("attention_sinks", *mixture.RARE, *GEMMA_FIELDS) if not getattr(self, name)}
        absent |= {*(() if self.num_moe_experts else MOE_FIELDS), *(() if self.hybrid_pattern else hybrid.FIELDS)}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in absent}

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
        fixed: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
        return cls(**fixed)

    def replace(self, **sizes: Any) -> Architecture:
        """A mere number of layers does not say which ones stay: where only some have a window, each is then counted
        without one, which is at most too much."""
        if self.window_attn_skip_freq and sizes.get("num_layers", self.num_layers) != self.num_layers:
            sizes = dict.fromkeys(windows.FIELDS) | sizes
        return dataclasses.replace(self, **sizes)


_DENSE = {f.name: f.default for f in dataclasses.fields(Architecture) if "moe_" in f.name}
MOE_FIELDS = tuple(_DENSE)
GEMMA_FIELDS = ("post_norms", "scaled_embeddings", "zero_centered_norms", "capped_attention")


def _bytes_of(dtype: str) -> int:
    if dtype not in BYTES:
        raise InputError(f"dtype '{dtype}' is unknown; {nearest(dtype, BYTES)}")
    return BYTES[dtype]
