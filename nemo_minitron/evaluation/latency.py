"""Measures the forward pass of a shape on this machine, with transformers' model and random weights."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

from nemo_minitron.artifacts.json_types import HfConfig
from nemo_minitron.evaluation.model import dtype_name
from nemo_minitron.families.side_files import without_code

if TYPE_CHECKING:
    import torch


def forward_seconds(config: HfConfig, *, batch: int, context: int, precision: str = "bf16", repeat: int = 5) -> float:
    """Seconds of one forward pass over `batch` sequences of `context` tokens (prefill), the median of `repeat`.

    `config` is a Hugging Face config. The model runs in `precision`, on the GPU if there is one, after one pass to warm
    up. It is transformers' time, not that of a serving engine, so use it to compare shapes. Raises InputError for an
    unknown precision.
    """
    dtype = dtype_name(precision)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = {name: value for name, value in without_code(config).items() if name != "model_type"}
    with device:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **known), trust_remote_code=False
        )
        tokens = torch.zeros((batch, context), dtype=torch.long)
    model = model.to(getattr(torch, dtype)).eval()
    times = []
    for _ in range(repeat + 1):
        wait(device)
        start = time.perf_counter()
        with torch.inference_mode():
            model(tokens, use_cache=False)
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def wait(device: torch.device) -> None:
    """Waits for the GPU, which works asynchronously."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()
