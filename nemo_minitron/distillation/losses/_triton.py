"""The KL's two passes over the logits as Triton kernels. They run on CUDA tensors if Triton is installed.

Shapes (docs/shapes.md): N tokens, W columns of the vocabulary on this rank, M statistics of a token.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def usable(logits: Tensor) -> bool:
    """Whether the kernels can run on these logits."""
    return logits.is_cuda and _installed()


def statistics(student_NW: Tensor, teacher_NW: Tensor, temperature: float) -> Tensor:
    """Logits of any float dtype -> this shard's centred statistics of a forward KL [7, N], fp32 (`_softmax`).

    The logits are read once.
    """
    from nemo_minitron.distillation.losses import _triton_kernels as kernels

    tokens, width = student_NW.shape
    teacher_NW = teacher_NW if teacher_NW.stride(1) == 1 else teacher_NW.contiguous()
    out_MN = torch.empty(7, tokens, dtype=torch.float32, device=student_NW.device)
    strides = student_NW.stride(0), teacher_NW.stride(0)
    options = kernels.launch(width, *kernels.STATISTICS)
    if tokens:
        kernels.kl_statistics[(tokens,)](
            student_NW, teacher_NW, out_MN, *strides, tokens, width, 1 / temperature, **options
        )
    return out_MN


def write_gradient(
    out_NW: Tensor, student_NW: Tensor, teacher_NW: Tensor, temperature: float, joined_MN: Tensor,
    factors_N: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes T (p_s - p_t), times the fp32 factors if they are given. `out_NW` may be `student_NW`.

    `joined_MN`: the statistics of the whole vocabulary, `_softmax.Joined`. Autograd does not see the write.
    """
    from nemo_minitron.distillation.losses import _triton_kernels as kernels

    tokens, width = student_NW.shape
    teacher_NW = teacher_NW if teacher_NW.stride(1) == 1 else teacher_NW.contiguous()
    strides = out_NW.stride(0), student_NW.stride(0), teacher_NW.stride(0)
    options = kernels.launch(width, *kernels.GRADIENT)
    tensors = out_NW, student_NW, teacher_NW, joined_MN.contiguous(), factors_N
    if tokens and width:
        grid = (tokens, -(-width // options["BLOCK"]))
        kernels.kl_gradient[grid](*tensors, *strides, tokens, width, 1 / temperature, **options)
