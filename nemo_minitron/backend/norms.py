"""RMSNorm and LayerNorm as in Transformer Engine: fp32 inside, and parameters that know about sequence parallelism.

Shapes (docs/shapes.md): H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_minitron.errors import InputError

KINDS = ("RMSNorm", "LayerNorm")


def device_of(config: Any) -> torch.device | str | int:
    """The device on which a Megatron config wants its parameters."""
    if config.use_cpu_initialization:
        return "cpu"
    return "meta" if getattr(config, "init_model_with_meta_device", False) else torch.cuda.current_device()


def norm_parameters(config: Any, width: int) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Gamma and, for LayerNorm, beta: [width] each, in `params_dtype`, the same on every tensor-parallel rank.

    Under sequence parallelism a rank sees only its part of the sequence. Megatron then sums the gradients of the
    parameters that are flagged `sequence_parallel`. Raises InputError for another normalization.
    """
    if config.normalization not in KINDS:
        raise InputError(f"normalization '{config.normalization}' is unknown; legal are: {', '.join(KINDS)}")
    start = 0.0 if config.layernorm_zero_centered_gamma else 1.0
    gamma = _parameter(config, width, start)
    return gamma, None if config.normalization == "RMSNorm" else _parameter(config, width, 0.0)


def _parameter(config: Any, width: int, value: float) -> nn.Parameter:
    tensor = torch.full((width,), value, dtype=config.params_dtype, device=device_of(config))
    parameter = nn.Parameter(tensor)
    parameter.sequence_parallel = config.sequence_parallel
    parameter.allreduce = True
    return parameter


def normalize(x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float, rms: bool, zero_centered: bool) -> Tensor:
    """The norm of x [..., H] over H, in gamma's dtype. It is computed in fp32 (fp64 stays fp64) and rounded once."""
    out = gamma.dtype
    if out in (torch.float16, torch.bfloat16) or x.dtype is not out:
        wide = torch.promote_types(torch.promote_types(x.dtype, out), torch.float32)
        x, gamma, beta = x.to(wide), gamma.to(wide), None if beta is None else beta.to(wide)
    if zero_centered:
        gamma = gamma + 1
    if rms:
        y = F.rms_norm(x, gamma.shape, gamma, eps)
    else:
        y = F.layer_norm(x, gamma.shape, gamma, beta, eps)
    return y.to(out)


def ignore_extra_state(module: nn.Module) -> None:
    """Lets a module load without `_extra_state`, where Transformer Engine keeps its FP8 state, and ignore one."""

    def default(state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.setdefault(f"{prefix}_extra_state", None)

    module._register_load_state_dict_pre_hook(default)


class Norm(nn.Module):
    """A separate norm: the final one, those of queries and keys, and the one in front of a mixture of experts.

    Input and output are [..., H]. The parameters are `weight` and, for LayerNorm, `bias`, as in Transformer Engine. In
    a checkpoint it has an empty `_extra_state`, because Transformer Engine needs one when it reads the checkpoint (NeMo
    reads strictly by default). One that Transformer Engine has written is read and ignored here.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight, bias = norm_parameters(config, hidden_size)
        self.register_parameter("bias", bias)
        self.eps, self.rms = eps, config.normalization == "RMSNorm"
        self.zero_centered = config.layernorm_zero_centered_gamma
        ignore_extra_state(self)

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, self.weight, self.bias, self.eps, self.rms, self.zero_centered)

    def get_extra_state(self) -> None:
        """An empty state, which must be present: see the class."""

    def set_extra_state(self, state: Any) -> None:
        """Transformer Engine's FP8 state is ignored."""

    def extra_repr(self) -> str:
        kind = "rms" if self.rms else "layer"
        return f"{kind}, {self.weight.shape[0]}, eps={self.eps}, zero_centered={self.zero_centered}"
