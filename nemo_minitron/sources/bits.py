"""Raw bits <-> torch tensors; only this file translates between dtypes of safetensors and of torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nemo_minitron.sources.tensors import RAW

DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def as_tensor(raw: np.ndarray, dtype: str) -> Tensor:
    """Raw bits of a safetensors dtype -> a torch tensor, which shares their memory if they are contiguous."""
    signed = np.ascontiguousarray(raw).view(np.dtype(f"int{raw.dtype.itemsize * 8}"))
    return torch.from_numpy(signed).view(TORCH_DTYPES[dtype])


def as_raw(tensor: Tensor) -> np.ndarray:
    """A torch tensor's raw bits, as unsigned integers on the CPU."""
    signed = tensor.detach().cpu().contiguous().view(getattr(torch, f"int{tensor.element_size() * 8}"))
    return signed.numpy().view(RAW[DTYPES[tensor.dtype]])
