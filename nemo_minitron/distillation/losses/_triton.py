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
    """[rows, W] of any float dtype -> the part of a forward KL [5, rows], fp32 (`_softmax.Whole`), in one read."""
    from nemo_minitron.distillation.losses import _triton_kernels as kernels

    rows, width = student.shape
    teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    found = torch.empty(5, rows, dtype=torch.float32, device=student.device)
    strides = student.stride(0), teacher.stride(0)
    block = kernels.block(width)
    if rows:
        kernels.kl_statistics[(rows,)](student, teacher, found, *strides, rows, width, temperature, BLOCK=block)
    return found


def write_gradient(out: Tensor, student: Tensor, teacher: Tensor, temperature: float, whole: Tensor) -> None:
    """T (p_s - p_t) into `out` [rows, W], which may be `student`; `whole` is `statistics` of the whole vocabulary."""
    from nemo_minitron.distillation.losses import _triton_kernels as kernels

    rows, width = student.shape
    teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    strides, block = (out.stride(0), student.stride(0), teacher.stride(0)), kernels.block(width)
    grid, whole = (rows, -(-width // block)), whole.contiguous()
    if rows and width:
        kernels.kl_gradient[grid](out, student, teacher, whole, *strides, rows, width, temperature, BLOCK=block)
