"""Hybrids with Mamba-2 (Nemotron-H, 2504.11409): the channels of the heads, and the norms of layers and block.

The attention and MLP layers of a hybrid are Transformer layers, which `dense` scores.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.ssm.mamba_block import MambaStack
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.ssm.mamba_mixer import MambaMixer
from torch import Tensor, nn

from nemo_minitron.architecture import Architecture
from nemo_minitron.importance.estimators import dense
from nemo_minitron.importance.registry import Estimator, Output, Watch, estimator


@estimator(MambaMixer)
class MambaChannels(Estimator):
    """The part x of the input projection's output, before the convolution: [num_layers, heads * channels].

    Scores of heads and of the channels in them are derived from it.
    """

    axis = "mamba_channels"

    def watch(self, module: nn.Module, layer: int, architecture: Architecture) -> Watch:
        inner = module.d_inner_local_tp
        of_x = slice(inner, 2 * inner)  # the rank's rows are [z | x | B | C | dt]

        def values(_: nn.Module, module_input: Tensor, output: Output) -> Tensor:
            return output[0][..., of_x]

        def taylor(_: nn.Module, module_input: Tensor, output: Output) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            x = output[0].detach()
            return output[0], lambda gradient: (x * gradient)[..., of_x]

        return Watch(layer, module.in_proj, values, taylor)


@estimator(MambaLayer)
class MambaNorms(Estimator):
    """As `dense.InputNorms`: the norm in front of the mixer."""

    axis, sharded = "norms", False

    def watch(self, module: nn.Module, layer: int, architecture: Architecture) -> Watch | None:
        return dense.watch_norm(2 * layer, module.norm, module.mixer.in_proj, module.config)


@estimator(MambaLayer)
class MambaInfluence(dense.BlockInfluence):
    """As in a Transformer layer."""


@estimator(MambaLayer)
class MambaStreamLogs(dense.StreamLogs):
    """As in a Transformer layer."""


@estimator(MambaStack)
class HybridFinalNorm(dense.FinalNorm):
    """Megatron's block of a hybrid has another name for it."""

    name = "final_norm"
