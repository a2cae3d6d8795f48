"""One forward pass over calibration batches, outside a trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.scores import Scores
from nemo_minitron.errors import InputError
from nemo_minitron.importance.collector import WIDTH_AXES, Collector, unwrap
from nemo_minitron.importance.reduce import reduce
from nemo_minitron.importance.statistics import check_norms


def estimate(
    model: Any,
    batches: Iterable[Any],
    *,
    criterion: str = "l2,mean",
    norms: str = "all",
    axes: Iterable[str] = (*WIDTH_AXES, "layers"),
    architecture: Architecture | None = None,
) -> Scores:
    """Scores of a live model, the same on every rank (2407.14679, section 2.2).

    `model`: a Megatron model or a list of its chunks, as `load_model` gives it. `batches`: this data-parallel
    rank's own, each an int64 [batch, sequence] tensor or NeMo's batch dict with `tokens`; all of one shape.
    Collective over the whole job. Raises InputError for an unknown criterion or for no batches.
    """
    check_norms(norms)
    chunks = list(model) if isinstance(model, (list, tuple, torch.nn.ModuleList)) else [model]
    architecture = architecture or architecture_of(unwrap(chunks[0]))
    modes = [chunk.training for chunk in chunks]
    rows = [_tokens(batch) for batch in batches]
    if not rows:
        raise InputError("no calibration batches were given; at least one is needed")
    try:
        for chunk in chunks:
            chunk.eval()
        with Collector(chunks, architecture, criterion, axes) as collector, torch.no_grad():
            _forward(chunks, rows)
    finally:
        for chunk, mode in zip(chunks, modes, strict=True):
            chunk.train(mode)
    return reduce(collector, norms)


def architecture_of(model: Any) -> Architecture:
    """The Architecture of a live Megatron model, read off its config.

    The vocabulary is the true one where NeMo recorded it (what the config was constructed with), since the
    live config's may be padded for its layout; else the model's own.
    """
    config = model.config
    recorded = getattr(getattr(config, "__io__", None), "vocab_size", None)
    qkv = bool(config.add_bias_linear or config.add_qkv_bias)
    return Architecture(
        num_layers=config.num_layers, hidden_size=config.hidden_size, ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads, num_query_groups=config.num_query_groups,
        head_dim=config.kv_channels, vocab_size=recorded or model.vocab_size,
        gated_mlp=config.gated_linear_unit, tied_embeddings=model.share_embeddings_and_output_weights,
        normalization=config.normalization.lower(), qkv_bias=qkv, attention_output_bias=config.add_bias_linear,
        mlp_bias=config.add_bias_linear, qk_norm=config.qk_layernorm,
    )  # fmt: skip


def _tokens(batch: Any) -> Tensor:
    return batch["tokens"] if isinstance(batch, dict) else torch.as_tensor(batch)


def _forward(chunks: list[Any], rows: list[Tensor]) -> None:
    """Runs every batch through this rank's chunks, by Megatron's own schedule of the layout."""
    stages, virtual = parallel_state.get_pipeline_model_parallel_world_size(), len(chunks) > 1
    if virtual and len(rows) % stages:
        raise InputError(
            f"{len(rows)} batches do not divide over {stages} pipeline stages with virtual stages; "
            f"the nearest legal number is {max(1, round(len(rows) / stages)) * stages}"
        )
    device = next(chunks[0].parameters()).device
    together = len(rows) if virtual else 1  # one by one otherwise: no more than one batch's outputs are held
    for start in range(0, len(rows), together):
        part = [row.to(device) for row in rows[start : start + together]]
        get_forward_backward_func()(
            forward_step_func=_step,
            data_iterator=[iter(part) for _ in chunks] if virtual else iter(part),
            model=chunks if virtual else chunks[0],
            num_microbatches=len(part),
            seq_length=part[0].shape[1],
            micro_batch_size=part[0].shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )


def _step(iterator: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
    tokens = next(iterator)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return model(tokens, positions, None), lambda output, non_loss_data=False: 0
