"""Where a live model's intermediate states are seen: after the norms that read them (2407.14679, section 3.3).

| state | seen as |
|---|---|
| embedding | the output of the first layer's input norm |
| attention of a layer | the output of its pre-MLP norm |
| block of a layer | the output of the next layer's input norm, after the last layer of the final one |
| mlp of a layer | its MLP's own output, scaled to unit RMS: no norm reads it alone |

So the output of a block is seen on the pipeline stage of the layer that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from nemo_minitron.backend.norms import normalize
from nemo_minitron.distillation.layer_map import EMBEDDING, Point

See = Callable[[Point, Tensor], Tensor | None]
"""What is called with a state [S(/tp under sequence parallelism), B, H]. A scalar that it returns gives its own
gradient to the state as the backward pass comes by: a loss on a stage that is not the last."""


def points(chunk: Any) -> set[Point]:
    """The states that this chunk of a model shows."""
    return {point for point, _, _ in _sites(chunk)}


def tap(chunk: Any, wanted: set[Point], see: See) -> list[RemovableHandle]:
    """Hooks on the wanted states of a chunk."""
    sites = [site for site in _sites(chunk) if site[0] in wanted]
    return [_hook(point, module, how, see, chunk.config) for point, module, how in sites]


def _sites(chunk: Any) -> Iterator[tuple[Point, Any, str]]:
    for layer in chunk.decoder.layers:
        number = layer.layer_number - 1
        read: Point = ("block", number - 1) if number else (EMBEDDING, -1)
        yield read, *_norm(layer.input_layernorm, getattr(layer.self_attention, "linear_qkv", None))
        yield ("attention", number), *_norm(layer.pre_mlp_layernorm, getattr(layer.mlp, "linear_fc1", None))
        yield ("mlp", number), layer.mlp, "scaled"
    if chunk.decoder.final_layernorm is not None:
        yield ("block", chunk.config.num_layers - 1), chunk.decoder.final_layernorm, "output"


def _norm(norm: Any, fused: Any) -> tuple[Any, str]:
    """A norm of its own shows its output; one fused with the linear layer behind it is computed again."""
    return (fused, "fused") if isinstance(norm, IdentityOp) else (norm, "output")


def _hook(point: Point, module: Any, how: str, see: See, config: Any) -> RemovableHandle:
    if how == "fused":
        rms, zero_centered = config.normalization == "RMSNorm", config.layernorm_zero_centered_gamma

        def before(linear: Any, given: tuple) -> tuple | None:
            gamma, beta = linear.layer_norm_weight, getattr(linear, "layer_norm_bias", None)
            loss = see(point, normalize(given[0], gamma, beta, config.layernorm_epsilon, rms, zero_centered))
            return None if loss is None else (_Attach.apply(given[0], loss), *given[1:])

        return module.register_forward_pre_hook(before)

    def after(_: Any, given: tuple, output: Any) -> Any:
        state, *rest = output if isinstance(output, tuple) else (output,)
        shown = state if not rest or rest[0] is None else state + rest[0]  # a bias that is added later
        if how == "scaled":
            shown = F.rms_norm(shown.float(), shown.shape[-1:], eps=config.layernorm_epsilon)
        loss = see(point, shown)
        if loss is None:
            return None
        attached = _Attach.apply(state, loss)
        return (attached, *rest) if isinstance(output, tuple) else attached

    return module.register_forward_hook(after)


class _Attach(torch.autograd.Function):
    """The identity on a tensor that also starts the backward pass of a scalar."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.detach()
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.ones_like(ctx.like)
