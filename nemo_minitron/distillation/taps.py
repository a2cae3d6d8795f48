"""Where a live model's intermediate states are read: after the norms that follow them (2407.14679, section 3.3).

| state | read as |
|---|---|
| embedding | the output of the first layer's input norm |
| attention of a layer | the output of its pre-MLP norm |
| block of a layer | the output of the next layer's input norm; of the last layer, the output of the final norm |
| mlp of a layer | the output of its MLP, scaled to unit RMS: no norm reads it alone |

So the output of a block is read on the pipeline stage of the next layer. A layer of a hybrid is one of Mamba-2,
attention or an MLP, with one norm in front: it has no state between attention and MLP, and only an MLP layer has `mlp`.

Shapes (docs/shapes.md): S positions of the sequence, B sequences, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nemo_minitron.backend.norms import normalize
from nemo_minitron.distillation.layer_map import EMBEDDING, Point

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule
    from torch.autograd.function import FunctionCtx

See = Callable[[Point, Tensor], Tensor | None]
"""It is called with a state [S, B, H] (S / tp under sequence parallelism). It may return a loss, a scalar. Then the
backward pass adds the loss's gradient to the state's. So a stage that is not the last one can have a loss."""


def points(chunk: MegatronModule) -> set[Point]:
    """The states that can be read on this chunk of a model."""
    return {point for point, _, _ in _sites(chunk)}


def tap(chunk: MegatronModule, wanted: set[Point], see: See) -> list[RemovableHandle]:
    """Puts hooks on a chunk that give the wanted states to `see`."""
    sites = [site for site in _sites(chunk) if site[0] in wanted]
    return [_hook(point, module, how, see, chunk.config) for point, module, how in sites]


def _sites(chunk: MegatronModule) -> Iterator[tuple[Point, nn.Module, str]]:
    """(state, the module that shows it, how: "output", "fused" or "scaled")."""
    for layer in chunk.decoder.layers:
        number = layer.layer_number - 1
        read: Point = ("block", number - 1) if number else (EMBEDDING, -1)
        if hasattr(layer, "mixer"):
            yield read, *_norm(layer.norm, layer.mixer.in_proj)
            continue
        attends, has_mlp = (not isinstance(part, IdentityOp) for part in (layer.self_attention, layer.mlp))
        pre_mlp = _norm(layer.pre_mlp_layernorm, getattr(layer.mlp, "linear_fc1", None))
        first = _norm(layer.input_layernorm, getattr(layer.self_attention, "linear_qkv", None)) if attends else pre_mlp
        yield read, *first
        if attends and has_mlp:
            yield ("attention", number), *pre_mlp
        if has_mlp:
            yield ("mlp", number), layer.mlp, "scaled"
    final = getattr(chunk.decoder, "final_norm" if chunk.config.is_hybrid_model else "final_layernorm", None)
    if final is not None:
        yield ("block", chunk.config.num_layers - 1), final, "output"


def _norm(norm: nn.Module, fused: nn.Module) -> tuple[nn.Module, str]:
    """A separate norm shows its output. A norm that is fused with the next linear layer is computed again."""
    return (fused, "fused") if isinstance(norm, IdentityOp) else (norm, "output")


def _hook(point: Point, module: nn.Module, how: str, see: See, config: TransformerConfig) -> RemovableHandle:
    if how == "fused":
        rms, zero_centered = config.normalization == "RMSNorm", config.layernorm_zero_centered_gamma

        def before(linear: nn.Module, inputs: tuple) -> tuple | None:
            gamma_H, beta_H = linear.layer_norm_weight, getattr(linear, "layer_norm_bias", None)
            loss = see(point, normalize(inputs[0], gamma_H, beta_H, config.layernorm_epsilon, rms, zero_centered))
            return None if loss is None else (_Attach.apply(inputs[0], loss), *inputs[1:])

        return module.register_forward_pre_hook(before)

    def after(_: nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        output_SBH, *rest = output if isinstance(output, tuple) else (output,)
        # The second output is a bias, which Megatron adds later.
        state_SBH = output_SBH if not rest or rest[0] is None else output_SBH + rest[0]
        if how == "scaled":
            state_SBH = F.rms_norm(state_SBH.float(), state_SBH.shape[-1:], eps=config.layernorm_epsilon)
        loss = see(point, state_SBH)
        if loss is None:
            return None
        attached_SBH = _Attach.apply(output_SBH, loss)
        return (attached_SBH, *rest) if isinstance(output, tuple) else attached_SBH

    return module.register_forward_hook(after)


class _Attach(torch.autograd.Function):
    """The identity on a tensor. Its backward pass also starts the backward pass of a loss, with the gradient 1."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.detach()
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.ones_like(ctx.like)
