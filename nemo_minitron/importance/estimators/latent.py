"""Multi-latent attention: the norms of its latents, which are no part of `hidden`. `dense.Heads` scores its heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, nn

from nemo_minitron.architecture import Architecture
from nemo_minitron.importance.estimators.dense import watch_norm
from nemo_minitron.importance.registry import Estimator, Output, Watch, estimator


class _LatentNorm(Estimator):
    """[num_layers, rank]: the latent after its norm. Every tensor-parallel rank has all of it."""

    sharded = False
    part: str

    def watch(self, module: nn.Module, layer: int, architecture: Architecture) -> Watch | None:
        norm = getattr(module, f"{self.part}_layernorm", None)
        if norm is None:  # queries without a low rank
            return None
        watch = watch_norm(layer, norm, getattr(module, f"linear_{self.part}_up_proj"), module.config)
        return None if watch is None else dataclasses.replace(watch, values=_rows(watch), taylor=None)


def _rows(watch: Watch) -> Callable[[nn.Module, Tensor, Output], Tensor]:
    """Packed samples come as [tokens, rank]. They are one row of the batch."""

    def values(module: nn.Module, module_input: Tensor, output: Output) -> Tensor:
        latents = watch.values(module, module_input, output)
        return latents[:, None] if latents.dim() == 2 else latents

    return values


@estimator(MLASelfAttention)
class QueryLatentNorm(_LatentNorm):
    axis, part = "q_latent", "q"


@estimator(MLASelfAttention)
class KeyValueLatentNorm(_LatentNorm):
    axis, part = "kv_latent", "kv"
