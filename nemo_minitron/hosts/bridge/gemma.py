"""Gemma on Megatron-Bridge: a provider, and the modules in which a Gemma differs from Megatron's own layers.

Bridge has providers for Gemma 2 and 3. They give windows to layers by a fixed pattern, which a cut of layers breaks.
Their norms behind attention and MLP have an epsilon of 1e-5, whatever the model's is. Gemma 3's multiplies bf16
embeddings by a number that transformers rounds; Gemma 2's capped attention has neither context parallelism nor packed
rows. So a checkpoint names this provider, and Bridge without this package refuses it.

Shapes (docs/shapes.md): S positions of the queries, P positions of keys and values, B sequences, A attention heads, G
query groups, Y channels of one head, W columns of the vocabulary on this rank, X further dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from megatron.bridge.models.common.te_layers import TERowParallelLinearLayerNorm
from megatron.bridge.models.gpt_provider import GPTModelProvider, transformer_engine_layer_spec
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from nemo_minitron.backend.attention import Attention


def layer_spec(config: GemmaProvider) -> ModuleSpec:
    """Megatron's layers with a norm behind attention and MLP, the layer's own rotary base, and capped attention."""
    spec = transformer_engine_layer_spec(config)
    attention, mlp = spec.submodules.self_attention, spec.submodules.mlp.keywords["submodules"]
    attention.submodules.linear_proj = mlp.linear_fc2 = RowLinearWithNorm
    if config.rotary_base_local is not None:
        attention.module = TwoBasesAttention
    if config.attn_logit_softcapping is not None:
        attention.submodules.core_attention = CappedAttention
    return spec


@dataclasses.dataclass
class GemmaProvider(GPTModelProvider):
    """Bridge's provider of GPT models with the fields of a Gemma.

    `rotary_base_local`: the base of the layers with a window (None: that of all). The caps are None where there is
    none. `post_norms` and `scaled_embeddings` are those of `Architecture`.
    """

    post_norms: bool = True
    scaled_embeddings: bool = True
    rotary_base_local: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    transformer_layer_spec: ModuleSpec | Callable[[GPTModelProvider], ModuleSpec] = layer_spec

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> Any:
        model = super().provide(pre_process, post_process, vp_stage)
        if model.pre_process:
            model.embedding.__class__ = ScaledEmbedding
        if model.post_process and self.final_logit_softcapping is not None:
            model.output_layer.__class__ = CappedOutput
        if self.rotary_base_local is not None:
            model.rotary_pos_emb = TwoBases(self, model.pg_collection.cp)
        return model


class RowLinearWithNorm(TERowParallelLinearLayerNorm):
    """Bridge's linear layer with a norm of its output, which has the model's epsilon here; Bridge's is always 1e-5."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.post_layernorm = TENorm(config, output_size, eps=config.layernorm_epsilon)


class ScaledEmbedding(LanguageModelEmbedding):
    """Embeddings times sqrt(hidden_size), which is rounded to the weights' dtype, as in transformers."""

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        scale = torch.tensor(self.config.hidden_size**0.5, dtype=self.word_embeddings.weight.dtype)
        return super().forward(*arguments, **options) * scale.item()


def capped(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap)."""
    return torch.tanh(x / cap) * cap


class CappedOutput(ColumnParallelLinear):
    """The output layer with capped logits, [..., W]. Whoever multiplies states by its weight alone has other logits:
    `backend.differences.caps_logits` says so."""

    def forward(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        logits_XW, bias = super().forward(*arguments, **options)
        return capped(logits_XW, self.config.final_logit_softcapping), bias


class CappedAttention(Attention):
    """softmax(cap * tanh(Q K^T * scale / cap)) V, in plain PyTorch on every device.

    Neither Transformer Engine nor `scaled_dot_product_attention` has a cap, so the scores [B, A, S, P] exist as a
    whole. All else (windows, packed rows, context parallelism) is as in `Attention`."""

    def _product(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, p: float
    ) -> Tensor:
        """query [B, A, S, Y], key and value [B, G, P, Y] -> [B, A, S, Y]."""
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        scores_BASP = capped(query @ key.transpose(-1, -2) * self.softmax_scale, self.config.attn_logit_softcapping)
        if causal:
            mask = torch.ones(scores_BASP.shape[-2:], dtype=torch.bool, device=query.device).tril()
        if mask is not None and mask.dtype is torch.bool:
            scores_BASP = scores_BASP.masked_fill(~mask, float("-inf"))
        elif mask is not None:
            scores_BASP = scores_BASP + mask
        wide = torch.promote_types(query.dtype, torch.float32)
        weights_BASP = torch.softmax(scores_BASP, dim=-1, dtype=wide).to(query.dtype)
        return torch.dropout(weights_BASP, p, train=bool(p)) @ value


class TwoBasesAttention(SelfAttention):
    """Self-attention that takes the angles of its own layer: of `TwoBases`' two sets, the first if it has a window."""

    def forward(self, *arguments: Any, rotary_pos_emb: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        windowed = is_layer_window_attention(
            self.config.window_size, self.config.window_attn_skip_freq, self.layer_number
        )
        return super().forward(*arguments, rotary_pos_emb=rotary_pos_emb[0 if windowed else 1], **options)


class TwoBases(RotaryEmbedding):
    """The angles [2, S, 1, 1, Y]: those of layers with a window, then those of the others, whose positions alone are
    scaled."""

    def __init__(self, config: GemmaProvider, cp_group: Any) -> None:
        options = {"use_cpu_initialization": config.use_cpu_initialization, "cp_group": cp_group}
        factor = config.seq_len_interpolation_factor
        super().__init__(
            config.kv_channels, 1.0, rotary_base=config.rotary_base, seq_len_interpolation_factor=factor, **options
        )
        self.local = RotaryEmbedding(config.kv_channels, 1.0, rotary_base=config.rotary_base_local, **options)

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return torch.stack([self.local(*arguments, **options), super().forward(*arguments, **options)])
