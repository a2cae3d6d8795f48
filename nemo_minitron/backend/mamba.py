"""Mamba-2 in PyTorch, in the place of the CUDA kernels of `mamba_ssm` and `causal_conv1d`: the scan (`ssd.py`), the
convolution fused with it, and the gated norm (2405.21060, section 6).

Megatron's own mixer calls them; without the kernels it cannot even be built. They compute in fp32 (fp64 stays fp64) and
round where the kernels round. Autograd gives their gradients.

Shapes (docs/shapes.md): B sequences, S positions of the sequence, A Mamba heads of this rank, G their groups, Y
channels of one head, I channels of the state, X others.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nemo_minitron.backend.ssd import scan, wide
from nemo_minitron.backend.versions import replace
from nemo_minitron.errors import InputError


def mend(mixer: ModuleType) -> None:
    """Gives Megatron's module of the mixer what is in this file, in the place of the kernels."""
    replace(mixer, "HAVE_MAMBA_SSM", True)
    replace(mixer, "ExtendedRMSNorm", GatedNorm)
    replace(mixer, "causal_conv1d_fn", None)  # Megatron then takes torch's convolution
    if hasattr(mixer, "_check_mamba_sequence_packing_support"):  # Megatron-core 0.19
        replace(mixer, "_check_mamba_sequence_packing_support", packing_support)
    mixer.mamba_chunk_scan_combined = scan  # type: ignore[attr-defined]
    mixer.mamba_split_conv1d_scan_combined = convolve_and_scan  # type: ignore[attr-defined]


class GatedNorm(nn.Module):
    """RMSNorm of x * silu(z) over each group of `group_size` channels, in x's dtype.

    `weight` [hidden_size] is this tensor-parallel rank's shard. Raises InputError for a norm in front of the gate.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm_before_gate:
            raise InputError("norm_before_gate=True needs the kernels of mamba_ssm; legal is False")
        self.eps, self.group_size = eps, group_size or hidden_size
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)  # else the norm of gradients counts one shard

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x and its gate z are [..., hidden_size]. Without z, x is gated already."""
        gated = x.to(wide(x.dtype))
        if z is not None:
            gated = gated * F.silu(z.to(gated.dtype))
        normed = F.rms_norm(gated.unflatten(-1, (-1, self.group_size)), (self.group_size,), eps=self.eps).flatten(-2)
        return (normed * self.weight.to(gated.dtype)).to(x.dtype)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """The weight, divided over tensor-parallel ranks."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


def convolve_and_scan(
    projected: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dt_bias: Tensor,
    decay: Tensor,
    D: Tensor,
    chunk_size: int,
    activation: str = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = False,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """The input projection's output [B, S, z | x | B | C | dt] -> [B, S, A * Y], gated by z and not yet normed.

    The convolution of the channels x | B | C has `weight` [X, width] and `bias` [X]. `decay` and `dt_bias` are [A]. `D`
    is [A], or [A, Y] if there is no `headdim`. `norm_before_gate` says nothing here, because the norm comes later.
    `seq_idx` [1, S], of a packed row, has a number for each position's sample: no sample sees another one. Raises
    InputError for another activation than SiLU, and for several packed rows.
    """
    if seq_idx is not None:
        alone = [
            convolve_and_scan(one, weight, bias, dt_bias, decay, D, chunk_size, activation, headdim, ngroups)
            for one in projected.split(_lengths(seq_idx), dim=1)
        ]
        return torch.cat(alone, dim=1)
    if activation not in ("silu", "swish"):
        raise InputError(f"activation '{activation}' in Mamba needs the kernels of causal_conv1d; legal is 'silu'")
    heads, channels = decay.shape[0], weight.shape[0]
    inner = heads * (headdim or D.shape[-1])
    state = (channels - inner) // 2
    gate, convolved_BSX, dt_BSA = projected.split([inner, channels, heads], dim=-1)
    x, keys, queries = _convolve(convolved_BSX, weight, bias).split([inner, state, state], dim=-1)
    x_BSAY, gate_BSAY = (part.unflatten(-1, (heads, -1)) for part in (x, gate))
    keys_BSGI, queries_BSGI = (part.unflatten(-1, (ngroups, -1)) for part in (keys, queries))
    y_BSAY = scan(
        x_BSAY, dt_BSA, decay, keys_BSGI, queries_BSGI, chunk_size, D=D, z=gate_BSAY, dt_bias=dt_bias, dt_softplus=True
    )
    return torch.flatten(y_BSAY, -2)


def packing_support(for_inference_not_training: bool = True) -> tuple[bool, str | None]:
    """Megatron's question whether packed rows can run, and why not."""
    return not for_inference_not_training, "packed rows need the kernels of mamba_ssm for inference"


def _lengths(seq_idx: Tensor) -> list[int]:
    """The lengths of a packed row's samples."""
    if len(seq_idx) != 1:
        raise InputError(f"{len(seq_idx)} packed rows are in one batch of Mamba; legal is 1")
    return torch.unique_consecutive(seq_idx[0], return_counts=True)[1].tolist()


def _convolve(x_BSX: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """SiLU of a causal convolution of each channel, in x's dtype."""
    dtype = wide(x_BSX.dtype)
    padded = F.pad(x_BSX.to(dtype).transpose(1, 2), (weight.shape[1] - 1, 0))
    bias = None if bias is None else bias.to(dtype)
    convolved = F.conv1d(padded, weight.to(dtype)[:, None], bias, groups=weight.shape[0])
    return F.silu(convolved).transpose(1, 2).to(x_BSX.dtype)
