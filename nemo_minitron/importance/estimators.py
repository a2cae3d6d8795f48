"""Which activation of which Megatron module says what matters; a registry that users can add to.

Activations in Megatron are [S, B, C]: sequence, batch, channels; C is this tensor-parallel rank's share where
the estimator is `sharded`; otherwise all ranks hold all channels, and S is a share of the sequence under
sequence parallelism. Hooks see values; they never change them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from nemo_minitron.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Watch:
    """One place to look at: `row` of the axis's scores, and a module's input or output.

    `values(module, input, output)` gives [S, B, C] from the hooked module's first input and its output.
    """

    row: int
    module: nn.Module
    values: Callable[[nn.Module, Tensor, Any], Tensor]


class Estimator:
    """Scores one axis from one type of Megatron module; register it with `@estimator(ModuleType)`.

    `axis` names the tensor of Scores. `aggregate=False`
    keeps a plain mean over all tokens instead of the criterion, for [S, B] values (block influence).
    """

    axis: ClassVar[str]
    sharded: ClassVar[bool] = True
    aggregate: ClassVar[bool] = True

    def watch(self, module: Any, layer: int, architecture: Architecture) -> Watch | None:
        """Where to look in `module`, which lies in the 0-based global `layer`; None to skip it."""
        raise NotImplementedError


REGISTRY: dict[type, list[type[Estimator]]] = {}


def estimator(module_type: type) -> Callable[[type[Estimator]], type[Estimator]]:
    """Registers an Estimator for a Megatron module type and its subclasses; the last one of a row wins."""

    def add(cls: type[Estimator]) -> type[Estimator]:
        kept = [other for other in REGISTRY.get(module_type, []) if other.__qualname__ != cls.__qualname__]
        REGISTRY[module_type] = [*kept, cls]
        return cls

    return add


def estimators_of(module: nn.Module) -> list[type[Estimator]]:
    """What watches this module, by its type."""
    return [cls for kind, found in REGISTRY.items() if isinstance(module, kind) for cls in found]


def _input(module: nn.Module, given: Tensor, output: Any) -> Tensor:
    return given


@estimator(MLP)
class Neurons(Estimator):
    """The MLP's hidden activation, after gating: the input of `linear_fc2`."""

    axis = "ffn"

    def watch(self, module: Any, layer: int, architecture: Architecture) -> Watch:
        return Watch(layer, module.linear_fc2, _input)


@estimator(SelfAttention)
class Heads(Estimator):
    """Per token the L2 norm of each head's output: the input of `linear_proj` (2407.14679, section 2.2)."""

    axis = "heads"

    def watch(self, module: Any, layer: int, architecture: Architecture) -> Watch:
        width = architecture.head_dim

        def norms(_: nn.Module, given: Tensor, output: Any) -> Tensor:
            return given.unflatten(-1, (-1, width)).float().norm(dim=-1)

        return Watch(layer, module.linear_proj, norms)


class _Norm(Estimator):
    """A norm's output, one row a norm: input and pre-MLP norm of each layer, then the final one."""

    axis = "norms"
    sharded = False


@estimator(TransformerLayer)
class InputNorms(_Norm):
    def watch(self, module: Any, layer: int, architecture: Architecture) -> Watch:
        return _watch_norm(2 * layer, module.input_layernorm, module.self_attention.linear_qkv, module.config)


@estimator(TransformerLayer)
class PreMLPNorms(_Norm):
    def watch(self, module: Any, layer: int, architecture: Architecture) -> Watch:
        return _watch_norm(2 * layer + 1, module.pre_mlp_layernorm, module.mlp.linear_fc1, module.config)


@estimator(TransformerBlock)
class FinalNorm(_Norm):
    def watch(self, module: Any, layer: int, architecture: Architecture) -> Watch | None:
        norm = module.final_layernorm
        if norm is None:  # not on this pipeline stage
            return None
        return Watch(2 * architecture.num_layers, norm, lambda _, given, output: output)


@estimator(TransformerLayer)
class BlockInfluence(Estimator):
    """1 - cos(layer input, layer output), the mean over all tokens (2407.14679, section 2.2)."""

    axis = "layers"
    sharded = False
    aggregate = False

    def watch(self, module: Any, layer: int, architecture: Architecture) -> Watch:
        def influence(_: nn.Module, given: Tensor, output: Any) -> Tensor:
            hidden = output[0] if isinstance(output, tuple) else output
            return 1 - torch.nn.functional.cosine_similarity(given.float(), hidden.float(), dim=-1)

        return Watch(layer, module, influence)


def _watch_norm(row: int, norm: Any, fused: Any, config: Any) -> Watch:
    """A norm of its own shows its output; a fused one does not (nor under Transformer Engine), so it is
    computed again from its input."""
    if not isinstance(norm, IdentityOp):
        return Watch(row, norm, lambda _, given, output: output)

    def again(module: Any, given: Tensor, output: Any) -> Tensor:
        return normalize(given.float(), module.layer_norm_weight, getattr(module, "layer_norm_bias", None), config)

    return Watch(row, fused, again)


def normalize(x: Tensor, weight: Tensor, bias: Tensor | None, config: Any) -> Tensor:
    """RMSNorm or LayerNorm of fp32 `x` [..., H] as a Megatron config says, incl. zero-centred gamma."""
    gamma = weight.float() + 1 if config.layernorm_zero_centered_gamma else weight.float()
    if config.normalization == "RMSNorm":
        return torch.nn.functional.rms_norm(x, x.shape[-1:], gamma, config.layernorm_epsilon)
    beta = None if bias is None else bias.float()
    return torch.nn.functional.layer_norm(x, x.shape[-1:], gamma, beta, config.layernorm_epsilon)
