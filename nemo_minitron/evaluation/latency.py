"""Measures the forward pass of a shape on this machine, with transformers' model and random weights."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

from nemo_minitron.artifacts.json_types import HfConfig
from nemo_minitron.evaluation.model import check_loads, config_object, dtype_name
from nemo_minitron.families import from_hf
from nemo_minitron.families.side_files import without_code

if TYPE_CHECKING:
    import torch


def forward_seconds(config: HfConfig, *, batch: int, context: int, precision: str = "bf16", repeat: int = 5) -> float:
    """Seconds of one forward pass over `batch` sequences of `context` tokens (prefill), the median of `repeat`.

    `config` is a Hugging Face config. The model runs in `precision`, on the GPU if there is one, after one pass to warm
    up. It is transformers' time, not that of a serving engine, so use it to compare shapes. A hybrid's Mamba layers run
    as `evaluate` runs them (`mamba.py`). Raises InputError for an unknown precision, and for a hybrid that the
    installed transformers does not know.
    """
    dtype = dtype_name(precision)
    check_loads(config, "evaluate")
    import torch
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = AutoModelForCausalLM.from_config(config_object(without_code(config)), trust_remote_code=False)
        tokens = torch.zeros((batch, context), dtype=torch.long)
    if from_hf(config).hybrid_pattern:
        from nemo_minitron.evaluation.mamba import mend

        mend(model)
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
