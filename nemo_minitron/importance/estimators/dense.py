"""The estimators of dense decoders (2407.14679, section 2.2).

Shapes (docs/shapes.md): S positions of the sequence, B sequences, A attention heads, Y channels of one head, H hidden
size, X further dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from megatron.core.transformer.attention import Attention, SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from nemo_minitron.architecture import Architecture
from nemo_minitron.importance.registry import Estimator, Output, Watch, estimator

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


LEAST_NORM = 1e-12  # of a residual stream: a token that is 0 everywhere has a logarithm, too


def first_input(module: nn.Module, module_input: Tensor, output: Output) -> Tensor:
    """For `Watch.values`: the module's first input."""
    return module_input


def _output(module: nn.Module, module_input: Tensor, output: Output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def times_input(module: nn.Module, module_input: Tensor, output: Output) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Taylor: each element of the input times its gradient."""
    # Another tensor on the same memory: the pipeline's schedule may free a stage's input and output.
    x = module_input.detach()
    return module_input, lambda gradient: x * gradient


# -- MLP -----------------------------------------------------------------------------------------------
@estimator(MLP)
class Neurons(Estimator):
    """The MLP's hidden activation after gating, the input of `linear_fc2`. The default, as in Model Optimizer."""

    axis = "ffn"

    def watch(self, module: nn.Module, layer: int, architecture: Architecture) -> Watch:
        return Watch(layer, module.linear_fc2, first_input, times_input)


@estimator(MLP)
class PreActivations(Estimator):
    """X W1, the paper's own formula: the output of `linear_fc1`. In a gated MLP the half that is activated."""

    axis = "ffn_pre_activation"

    def watch(self, module: nn.Module, layer: int, architecture: Architecture) -> Watch:
        gated = module.config.gated_linear_unit

        def before(linear: nn.Module, module_input: Tensor, output: Output) -> Tensor:
            values = output[0]
            values = values if output[1] is None else values + output[1]  # a bias that is not added yet
            return values.chunk(2, dim=-1)[0] if gated else values

        return Watch(layer, module.linear_fc1, before)


# -- attention -----------------------------------------------------------------------------------------
@estimator(Attention)
class Heads(Estimator):
    """For each token the L2 norm of each head's output, the input of `linear_proj`. For multi-latent attention, too."""

    axis = "heads"

    def watch(self, module: nn.Module, layer: int, architecture: Architecture) -> Watch:
        heads = module.num_attention_heads_per_partition

        def norms(_: nn.Module, module_input: Tensor, output: Output) -> Tensor:
            return torch.linalg.vector_norm(module_input.float().unflatten(-1, (heads, -1)), dim=-1)

        def taylor(_: nn.Module, module_input: Tensor, output: Output) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            x = module_input.detach()
            return module_input, lambda gradient: (x * gradient).unflatten(-1, (heads, -1)).sum(-1)

        return Watch(layer, module.linear_proj, norms, taylor)


@estimator(Attention)
class HeadChannels(Estimator):
    """Each channel of the heads' outputs. The norm over a head's channels is taken at the end, as in Model
    Optimizer."""

    axis = "head_channels"

    def watch(self, module: nn.Module, layer: int, architecture: Architecture) -> Watch:
        return Watch(layer, module.linear_proj, first_input)


class _HeadNorm(Estimator):
    """A norm over head_dim. All heads share its gamma: [num_layers, head_dim]. It is no part of `hidden`."""

    sharded = False
    heads_are_positions = True
    part: str

    def watch(self, module: nn.Module, layer: int, architecture: Architecture) -> Watch | None:
        norm = getattr(module, self.part, None)
        if norm is None or isinstance(norm, IdentityOp):
            return None

        def spread(_: nn.Module, module_input: Tensor, output: Tensor) -> Tensor:
            return output.transpose(1, 2).flatten(0, 1)  # [S, B, A, Y] -> [S * A, B, Y]

        return Watch(layer, norm, spread)


@estimator(SelfAttention)
class QueryNorm(_HeadNorm):
    axis, part = "q_norm", "q_layernorm"


@estimator(SelfAttention)
class KeyNorm(_HeadNorm):
    axis, part = "k_norm", "k_layernorm"


# -- norms of the residual stream ----------------------------------------------------------------------
class _Norm(Estimator):
    """A norm's output, one row a norm: the input norm and the pre-MLP norm of each layer, then the final norm.

    Its Taylor score takes the residual stream in front of the norm: Transformer Engine does not give the output of a
    fused norm a place in the graph.
    """

    axis = "norms"
    sharded = False


@estimator(TransformerLayer)
class InputNorms(_Norm):
    def watch(self, module: nn.Module, layer: int, architecture: Architecture) -> Watch | None:
        fused = getattr(module.self_attention, "linear_qkv", None)
        return watch_norm(2 * layer, module.input_layernorm, fused, module.config)


@estimator(TransformerLayer)
class PreMLPNorms(_Norm):
    def watch(self, module: nn.Module, layer: int, architecture: Architecture) -> Watch | None:
        fused = getattr(module.mlp, "linear_fc1", None)
        return watch_norm(2 * layer + 1, module.pre_mlp_layernorm, fused, module.config)


@estimator(TransformerBlock)
class FinalNorm(_Norm):
    name = "final_layernorm"

    def watch(self, module: nn.Module, layer: int, architecture: Architecture) -> Watch | None:
        norm = getattr(module, self.name, None)
        if norm is None:  # not on this pipeline stage
            return None
        return Watch(2 * architecture.num_layers, norm, _output, times_input)


def watch_norm(row: int, norm: nn.Module, fused: nn.Module, config: TransformerConfig) -> Watch | None:
    """A separate norm shows its output. A norm that is fused with a linear layer does not, neither here nor in
    Transformer Engine, so it is computed again from its input."""
    if not isinstance(norm, IdentityOp):
        return Watch(row, norm, _output, times_input)
    if getattr(fused, "layer_norm_weight", None) is None:
        return None

    def again(module: nn.Module, module_input: Tensor, output: Output) -> Tensor:
        return normalize(
            module_input.float(), module.layer_norm_weight, getattr(module, "layer_norm_bias", None), config
        )

    return Watch(row, fused, again, times_input)


def normalize(x: Tensor, weight: Tensor, bias: Tensor | None, config: TransformerConfig) -> Tensor:
    """RMSNorm or LayerNorm of fp32 `x` [..., H], as a Megatron config says; gamma may be zero-centred."""
    gamma_H = weight.float() + 1 if config.layernorm_zero_centered_gamma else weight.float()
    if config.normalization == "RMSNorm":
        return torch.nn.functional.rms_norm(x, x.shape[-1:], gamma_H, config.layernorm_epsilon)
    beta_H = None if bias is None else bias.float()
    return torch.nn.functional.layer_norm(x, x.shape[-1:], gamma_H, beta_H, config.layernorm_epsilon)


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12)


# -- depth ---------------------------------------------------------------------------------------------
@estimator(TransformerLayer)
class BlockInfluence(Estimator):
    """1 - cos(layer input, layer output), the mean over all tokens.

    Its Taylor score is the first-order change of the loss if the layer is skipped: (output - input) times gradient.
    """

    axis = "layers"
    sharded = False
    aggregate = False

    def watch(self, module: nn.Module, layer: int, architecture: Architecture) -> Watch:
        def influence(_: nn.Module, module_input: Tensor, output: Output) -> Tensor:
            output_SBH = output[0] if isinstance(output, tuple) else output
            difference_SBH = _unit(module_input.float()).sub_(_unit(output_SBH.float()))
            # |a - b|^2 / 2 of unit vectors is 1 - cos, but keeps its digits where it is small.
            return torch.linalg.vector_norm(difference_SBH, dim=-1).square() / 2

        def taylor(_: nn.Module, module_input: Tensor, output: Output) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            output_SBH = output[0] if isinstance(output, tuple) else output
            added_SBH = output_SBH.detach() - module_input.detach()
            return output_SBH, lambda gradient: (added_SBH * gradient).sum(-1)

        return Watch(layer, module, influence, taylor)


# -- the length of the residual stream -----------------------------------------------------------------
@estimator(TransformerLayer)
class StreamLogs(Estimator):
    """The logarithm of the L2 norm of the residual stream, in front of each layer and behind the last; a mean over all
    tokens. It ranks nothing: a cut of layers is scaled by it (`pruning/gaps.py`).

    A mean counts absolute values, so logarithms above 0 and below 0 are two channels; `stream` is their difference.
    """

    axis = "stream_logs"
    sharded = False
    aggregate = False

    def watches(self, module: nn.Module, layer: int, architecture: Architecture) -> Iterator[Watch]:
        yield Watch(layer, module, lambda _, module_input, output: _logs(module_input))
        if layer == architecture.num_layers - 1:
            yield Watch(layer + 1, module, lambda _, module_input, output: _logs(_output(_, module_input, output)))


def _logs(state_SBH: Tensor) -> Tensor:
    """[S, B, 2]: the parts of log |x| above and below 0."""
    log_SB = torch.linalg.vector_norm(state_SBH.float(), dim=-1).clamp(min=LEAST_NORM).log()
    return torch.stack([log_SB.clamp(min=0), -log_SB.clamp(max=0)], -1)
