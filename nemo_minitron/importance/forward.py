"""One forward pass over calibration batches, without a trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_minitron import hybrid, windows
from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.criteria import check_norms
from nemo_minitron.artifacts.scores import ACTIVATION, Scores
from nemo_minitron.backend.wrappers import unwrap
from nemo_minitron.errors import InputError, nearest
from nemo_minitron.importance.batches import Batch, Watcher, forward_arguments, micro_batches, seen
from nemo_minitron.importance.collector import METHODS, Collector
from nemo_minitron.importance.reduction import reduce
from nemo_minitron.importance.taylor import differentiable, run_backward

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule


def estimate(
    model: MegatronModule | Sequence[MegatronModule],
    batches: Iterable[Batch | Tensor],
    *,
    criterion: str | Sequence[str] = "l2,mean",
    norms: str = "all",
    axes: Iterable[str] | None = None,
    architecture: Architecture | None = None,
    method: str = ACTIVATION,
) -> Scores:
    """Scores of a live model, the same on every rank (2407.14679, section 2.2).

    `model`: a Megatron model or a list of its chunks, as `load_model` gives it. `batches`: those of this data-parallel
    rank, each an int64 [batch, sequence] tensor or NeMo's batch dict: `tokens`, perhaps `loss_mask` (0 if the position
    does not count) and `cu_seqlens` (the boundaries of the samples that one row joins). Padding stands behind a sample
    (`backend/masks.py`). If there are several criteria,
    Scores show the first, and `Scores.under` gives the others. `axes`: the default is all that the model has. `method`:
    "activation" needs forward passes only; "taylor", activations times gradients, needs a backward pass for each batch
    (`taylor.py`). Collective over the whole job. Raises InputError for an unknown criterion, axis or method, if there
    are no batches, for padding on the left, for Taylor under virtual pipeline stages, and if an activation is not
    finite.
    """
    check_norms(norms)
    if method not in METHODS:
        raise InputError(f"method '{method}' is unknown; {nearest(method, METHODS)}")
    chunks = list(model) if isinstance(model, (list, tuple, torch.nn.ModuleList)) else [model]
    rows = micro_batches(batches, unwrap(chunks[0]).config, virtual=len(chunks) > 1)
    criteria = [criterion] if isinstance(criterion, str) else list(criterion)
    architecture = architecture or architecture_of(unwrap(chunks[0]))
    collector = Collector(chunks, architecture, criteria, axes, method)
    with evaluating(chunks):
        if method == ACTIVATION:
            with torch.no_grad(), collector:
                run_forward(chunks, rows, collector)
        else:
            with differentiable(chunks), collector:
                run_backward(chunks, rows, collector)
    return reduce(collector, norms)


class evaluating:
    """A context in which models are in evaluation mode. Afterwards each has its former mode."""

    def __init__(self, chunks: Sequence[MegatronModule]) -> None:
        self.chunks, self.modes = chunks, [chunk.training for chunk in chunks]

    def __enter__(self) -> None:
        for chunk in self.chunks:
            chunk.eval()

    def __exit__(self, *exception: object) -> None:
        for chunk, mode in zip(self.chunks, self.modes, strict=True):
            chunk.train(mode)


def architecture_of(model: MegatronModule) -> Architecture:
    """The Architecture of a live Megatron model, read from its config.

    The vocabulary of a live config may be padded for its layout. So it is taken from what the config was constructed
    with, if NeMo has recorded that, or from Bridge's config, which pads it while it builds; else it is the model's own.
    """
    config = model.config
    recorded = getattr(getattr(config, "__io__", config), "vocab_size", None)
    qkv = bool(config.add_bias_linear or config.add_qkv_bias)
    return Architecture(
        num_layers=config.num_layers, hidden_size=config.hidden_size, ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads, **_heads(config), vocab_size=recorded or model.vocab_size,
        gated_mlp=config.gated_linear_unit, tied_embeddings=model.share_embeddings_and_output_weights,
        normalization=config.normalization.lower(), qkv_bias=qkv, attention_output_bias=config.add_bias_linear,
        mlp_bias=config.add_bias_linear, attention_sinks=_sinks(config),
        **_mixture(config), **_hybrid(model),
        post_norms=getattr(config, "post_norms", False), scaled_embeddings=getattr(config, "scaled_embeddings", False),
        capped_attention=getattr(config, "attn_logit_softcapping", None) is not None,
        zero_centered_norms=config.layernorm_zero_centered_gamma and config.normalization == "RMSNorm",
        **windows.of_megatron(config.window_size, config.window_attn_skip_freq, config.num_layers),
    )  # fmt: skip


def _heads(config: TransformerConfig) -> dict[str, Any]:
    """The Architecture's fields of attention. The norms of latents are no norms of queries and keys."""
    if not config.multi_latent_attention:
        sizes = {"num_query_groups": config.num_query_groups, "head_dim": config.kv_channels}
        return {**sizes, "qk_norm": config.qk_layernorm}
    rotary = config.qk_pos_emb_head_dim
    own = {"num_query_groups": 1, "head_dim": config.qk_head_dim + rotary, "qk_pos_emb_head_dim": rotary}
    return own | {name: getattr(config, name) for name in ("kv_lora_rank", "q_lora_rank", "v_head_dim")}


def _mixture(config: TransformerConfig) -> dict[str, Any]:
    """The Architecture's fields of a mixture of experts. Megatron-core 0.15 has no field for a shared expert's gate, as
    its specs give none."""
    if not config.num_moe_experts:
        return {}
    freq = config.moe_layer_freq
    names = ("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
    sizes = {name: getattr(config, name) for name in names}
    sizes["moe_router_bias"] = config.add_bias_linear
    sizes["moe_shared_expert_gate"] = bool(getattr(config, "moe_shared_expert_gate", False))
    sizes["moe_router_enable_expert_bias"] = bool(config.moe_router_enable_expert_bias)
    sizes["moe_router_num_groups"] = config.moe_router_num_groups
    return sizes | {"moe_layer_freq": tuple(freq) if isinstance(freq, list) else freq}


def _sinks(config: TransformerConfig) -> bool:
    return getattr(config, "softmax_type", "vanilla") == "learnable"


def _hybrid(model: MegatronModule) -> dict[str, Any]:
    """The Architecture's fields of a hybrid. Megatron-core 0.19 has another name for the pattern, which may say where
    pipeline stages begin. Raises InputError for layers of multi-token prediction."""
    if not model.config.is_hybrid_model:
        return {}
    pattern = getattr(model, "hybrid_layer_pattern", None) or model.hybrid_override_pattern
    if "/" in pattern:
        raise InputError(f"the hybrid '{pattern}' has layers of multi-token prediction, which are not supported")
    sizes = {name: getattr(model.config, name) for name in hybrid.SIZES}
    return sizes | {"hybrid_pattern": pattern.replace("|", "")}


def run_forward(chunks: list[MegatronModule], rows: list[Batch], watcher: Watcher) -> None:
    """Runs every micro-batch through this rank's chunks, by Megatron's own schedule of the layout."""
    virtual = len(chunks) > 1
    # Without virtual stages one by one: then no more than one batch's outputs are in memory.
    together = len(rows) if virtual else 1
    for start in range(0, len(rows), together):
        part = rows[start : start + together]
        iterators = [seen(part, chunk, watcher) for chunk in range(len(chunks))]
        get_forward_backward_func()(
            forward_step_func=_step,
            data_iterator=iterators if virtual else iterators[0],
            model=chunks if virtual else chunks[0],
            num_microbatches=len(part),
            seq_length=part[0]["tokens"].shape[1],
            micro_batch_size=part[0]["tokens"].shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )


def _step(iterator: Iterator[Batch], model: MegatronModule) -> tuple[Tensor, Callable[..., int]]:
    return model(**forward_arguments(next(iterator), model)), lambda output, non_loss_data=False: 0
