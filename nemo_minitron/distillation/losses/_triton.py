"""The KL's two passes over the logits as Triton kernels: used on CUDA tensors where Triton is installed."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def usable(logits: Tensor) -> bool:
    return logits.is_cuda and _installed()


def statistics(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """[rows, W] of any float dtype -> the centred part of a forward KL [7, rows], fp32 (`_softmax`), in one read."""
    from nemo_minitron.distillation.losses import _triton_kernels as kernels

    rows, width = student.shape
    teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    found = torch.empty(7, rows, dtype=torch.float32, device=student.device)
    strides, how = (student.stride(0), teacher.stride(0)), kernels.launch(width, *kernels.STATISTICS)
    if rows:
        kernels.kl_statistics[(rows,)](student, teacher, found, *strides, rows, width, 1 / temperature, **how)
    return found


def write_gradient(
    out: Tensor, student: Tensor, teacher: Tensor, temperature: float, whole: Tensor, factors: Tensor | None = None
) -> None:
    """T (p_s - p_t) into `out` [rows, W], which may be `student`, times `factors` [rows], fp32, where they are given;
    `whole` is `statistics` of the whole vocabulary. Autograd does not see the write."""
    from nemo_minitron.distillation.losses import _triton_kernels as kernels

    rows, width = student.shape
    teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    strides, how = (out.stride(0), student.stride(0), teacher.stride(0)), kernels.launch(width, *kernels.GRADIENT)
    given = out, student, teacher, whole.contiguous(), factors
    if rows and width:
        grid = (rows, -(-width // how["BLOCK"]))
        kernels.kl_gradient[grid](*given, *strides, rows, width, 1 / temperature, **how)
