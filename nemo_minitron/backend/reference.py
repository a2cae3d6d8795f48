"""A pure-PyTorch twin of Transformer Engine's layers: the same module tree, parameter names and checkpoints.

Megatron's layer specs ask Transformer Engine's provider for layers. `install` puts this provider in its place, and also
the final norm, which Megatron chooses elsewhere. So NeMo's own model classes, with their default layer spec, build,
train and convert on any device, and Transformer Engine can read what they save.

Shapes (docs/shapes.md): S positions of the sequence, B sequences, C input channels of a linear layer on this rank, D
its input channels on all ranks, O its output channels.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
)
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.random import get_data_parallel_rng_tracker_name
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nemo_minitron.backend import differences, fp8
from nemo_minitron.backend.attention import Attention
from nemo_minitron.backend.norms import Norm, device_of, ignore_extra_state, norm_parameters, normalize
from nemo_minitron.backend.versions import replace
from nemo_minitron.errors import InputError


def _mark(parameter: nn.Parameter | None, dim: int) -> None:
    """Marks a parameter as a shard, as Transformer Engine always does. Megatron does so only if it initialises it.

    Without the mark the norm of gradients counts the shard of one rank only.
    """
    if parameter is not None and not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, True, dim, 1)


def _mark_expert(linear: nn.Module) -> None:
    """Marks experts that are sharded differently from the dense layers: they have other data-parallel ranks.

    Megatron recognises them only by expert parallelism. So without the mark it would not sum over the copies of experts
    that `expert_tensor_parallel_size` leaves whole.
    """
    config = linear.config
    if linear.is_expert and config.expert_tensor_parallel_size != config.tensor_model_parallel_size:
        for parameter in linear.parameters():
            parameter.allreduce = False


class _Emulating:
    """The product in FP8 (`fp8.py`) in the place of Megatron's, if the config asks for it.

    Megatron's product also does the collectives. Here its differentiable collectives are called around the product.
    """

    fp8: fp8.Scaling | None

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        if self.fp8 is None:
            return super()._forward_impl(input=input, weight=weight, bias=bias, **options)  # type: ignore[misc]
        if options["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(input, group=options["tp_group"])
        elif options["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=options["tp_group"])
        y = fp8.linear(input, weight, self.fp8)
        return y if bias is None else y + bias


class ColumnLinear(_Emulating, ColumnParallelLinear):
    """y [S, B, O/tp] = x [S or S/tp, B, D] W^T. `weight` [O/tp, D] and `bias` [O/tp] are local shards."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _mark(self.weight, 0)
        _mark(self.bias, 0)
        _mark_expert(self)
        self.fp8 = fp8.scaling_for(self.config)


class RowLinear(_Emulating, RowParallelLinear):
    """y [S or S/tp, B, O] = sum over ranks of x [S, B, C] W^T. `weight` [O, C] is a local shard, `bias` [O] is
    whole."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _mark(self.weight, 1)
        _mark_expert(self)
        self._experts_bias = self.bias is not None and self.is_expert
        if self._experts_bias:
            differences.check_biased_experts(self.config)
            self.bias.sequence_parallel = False  # a rank has tokens of its own, and no part of a sequence
        self.fp8 = fp8.scaling_for(self.config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x -> (y, the bias if it is to be added later). Megatron adds an expert's bias in place; y must be no view."""
        y, bias = super().forward(x)
        return y.clone() if self._experts_bias else y, bias


class LayerNormColumnParallelLinear(ColumnLinear):
    """A norm and a column-parallel linear layer in one module, as Transformer Engine fuses them.

    Besides the parameters of ColumnLinear it has `layer_norm_weight` [D] and, for LayerNorm, `layer_norm_bias` [D].
    They are whole on every tensor-parallel rank, also in a checkpoint. The norm's output does not leave the module.
    """

    def __init__(self, input_size: int, output_size: int, *, config: Any, is_expert: bool, **kwargs: Any) -> None:
        if is_expert or kwargs.get("gather_output"):
            raise InputError("a norm fused with a linear layer is neither an expert's nor gathered")
        super().__init__(input_size, output_size, config=config, is_expert=False, **kwargs)
        self.layer_norm_weight, bias = norm_parameters(config, input_size)
        self.register_parameter("layer_norm_bias", bias)
        for name in ("weight", "bias"):  # into Transformer Engine's order, which the optimizer's buckets follow
            self._parameters[name] = self._parameters.pop(name)
        self._norm = (config.layernorm_epsilon, config.normalization == "RMSNorm")
        self._zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        normed = normalize(x, self.layer_norm_weight, self.layer_norm_bias, *self._norm, self._zero_centered)
        return super().forward(normed, *args, **kwargs)


class Linear(nn.Module):
    """y [S or S/tp, B, O] = x [S or S/tp, B, D] W^T, whole and the same on every tensor-parallel rank.

    `weight` is [O, D] and `bias` [O]. Multi-latent attention projects down to its latents with it, as with Transformer
    Engine's `TELinear` in the mode "duplicated"; another mode raises InputError. Under sequence parallelism a rank sees
    its part of the sequence, and Megatron sums the gradients over the ranks. Without it the gradients of all ranks are
    equal, except those of the rotary key, which all heads share: see `forward`.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str | None,
        config: Any,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        skip_bias_add: bool,
        tp_comm_buffer_name: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if parallel_mode != "duplicated":
            raise InputError(f"a linear layer of parallel mode '{parallel_mode}' is unknown; legal is 'duplicated'")
        self.config, self.skip_bias_add, self.fp8 = config, skip_bias_add, fp8.scaling_for(config)
        options = {"dtype": config.params_dtype, "device": device_of(config)}
        self.weight = nn.Parameter(torch.empty(output_size, input_size, **options))
        self.register_parameter("bias", nn.Parameter(torch.zeros(output_size, **options)) if bias else None)
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()):  # the same on all ranks
                init_method(self.weight)
        for parameter in self.parameters():
            parameter.allreduce, parameter.sequence_parallel = True, config.sequence_parallel
        self._shared = config.qk_pos_emb_head_dim if tp_comm_buffer_name == "kv_down_proj" else 0
        ignore_extra_state(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x -> (y, the bias if it is to be added later).

        Without sequence parallelism each rank has only its own heads' gradient of the rotary key. Megatron's layer does
        not sum these gradients, so this layer does.
        """
        bias = None if self.skip_bias_add else self.bias
        y = F.linear(x, self.weight, bias) if self.fp8 is None else fp8.linear(x, self.weight, self.fp8)
        if self.fp8 is not None and bias is not None:
            y = y + bias
        if self._shared and y.requires_grad and not self.config.sequence_parallel:
            latent, rotary = y.split([y.shape[-1] - self._shared, self._shared], dim=-1)
            rotary.register_hook(_summed_over_ranks)
            y = torch.cat([latent, rotary], dim=-1)
        return y, self.bias if self.skip_bias_add else None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """Whole tensors, of which tensor- and data-parallel ranks hold copies."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, None, sharded_offsets)

    def get_extra_state(self) -> None:
        """An empty state, which must be present: see `Norm`."""

    def set_extra_state(self, state: Any) -> None:
        """Transformer Engine's FP8 state is ignored."""

    def backward_dw(self) -> None:
        """Does nothing: weight gradients are never delayed here."""


def _summed_over_ranks(gradient: Tensor) -> Tensor:
    # Not Megatron's copy_to_tensor_model_parallel_region: its backward loses the sum if the gradient is strided.
    total = gradient.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    return total


class ReferenceSpecProvider(BackendSpecProvider):
    """The layers that Megatron's layer specs ask for, in the order of Transformer Engine's provider."""

    def linear(self) -> type:
        return Linear

    def column_parallel_linear(self) -> type:
        return ColumnLinear

    def row_parallel_linear(self) -> type:
        return RowLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return LayerNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        return Norm  # the config decides which kind of norm, as with Transformer Engine's

    def core_attention(self) -> type:
        return Attention

    def grouped_mlp_modules(self, *_: Any, **__: Any) -> Any:
        return differences.experts(SequentialMLP, MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear))

    def activation_func(self) -> None:
        return None


TWINS = {
    "TELinear": Linear,
    "TENorm": Norm,
    "TELayerNormColumnParallelLinear": LayerNormColumnParallelLinear,
    "TEColumnParallelLinear": ColumnLinear,
    "TERowParallelLinear": RowLinear,
    "TEDotProductAttention": Attention,
}


def install() -> None:
    """Puts the twin where Megatron looks for Transformer Engine's layers.

    Most layer specs ask a provider for them. The others take them by name from Megatron's module of extensions; there,
    and in every module that has imported them from it, the twin gets these names.

    Raises InputError if this version of Megatron no longer looks there.
    """
    from megatron.core.extensions import transformer_engine as extensions
    from megatron.core.models.gpt import gpt_layer_specs, moe_module_specs
    from megatron.core.transformer import multi_latent_attention, multi_token_prediction, transformer_block
    from megatron.core.transformer.moe import moe_utils

    if not differences.chooses_provider(gpt_layer_specs):
        raise InputError("this Megatron-core builds its layers another way; run: minitron doctor")
    for module in (gpt_layer_specs, moe_module_specs, multi_token_prediction):
        module.TESpecProvider = ReferenceSpecProvider
    gpt_layer_specs.TENorm = Norm
    replace(transformer_block, "LayerNormImpl", Norm)
    replace(multi_latent_attention, "TELinear", Linear)  # its down projections' class is compared with it
    moe_utils.te_general_gemm = None  # the router uses it; Megatron names it without importing it
    _rename([(getattr(extensions, name), twin) for name, twin in TWINS.items()])


def _rename(twins: list[tuple[Any, type]]) -> None:
    """Gives the twins the names of Transformer Engine's layers in all of Megatron's modules that are loaded, and puts
    them into the layer specs there.

    Without Transformer Engine its layers are mocks there, so they are compared by identity.
    """
    twin_of = {id(layer): twin for layer, twin in twins}
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron."):
            _put(vars(module), twin_of)


def _put(values: dict[str, Any], twin_of: dict[int, type]) -> None:
    for name, value in list(values.items()):
        if id(value) in twin_of:
            values[name] = twin_of[id(value)]
        elif isinstance(value, functools.partial):
            _put(value.keywords, twin_of)
        elif isinstance(value, ModuleSpec) or type(value).__name__.endswith("Submodules"):
            _put(vars(value), twin_of)
