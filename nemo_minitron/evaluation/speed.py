"""How fast a model answers on this machine: the time until its first token, and the tokens that follow in a second."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.evaluation.latency import wait
from nemo_minitron.evaluation.model import load

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROMPT, NEW = 256, 32  # tokens of the prompt, and tokens written after it


def speed(
    folder: str | Path, *, precision: str = "bf16", prompt: int = PROMPT, new: int = NEW, repeat: int = 3
) -> JsonObject:  # fmt: skip
    """Seconds until the first token after `prompt` tokens (`latency`), and tokens a second of the `new` ones after it,
    one sequence, greedy: the medians of `repeat`, after one pass to warm up. Also the precision and the `device`.

    It is transformers' time, not that of a serving engine, so use it to compare models. Raises InputError as `load`.
    """
    import torch

    model = load(folder, precision)
    prompt = min(prompt, (getattr(model.config, "max_position_embeddings", None) or prompt + new) - new)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, max(1, prompt)), generator=generator).to(model.device)
    with torch.inference_mode():
        model(ids, use_cache=False)
        runs = [_answer(model, ids, new) for _ in range(repeat)]
    first, after = (statistics.median(times) for times in zip(*runs, strict=True))
    values: JsonObject = {"latency": first, "tokens_per_second": new / after, "prompt": ids.shape[1], "new": new}
    return values | {"precision": precision, "device": device_name(model.device)}


def _answer(model: PreTrainedModel, ids: torch.Tensor, new: int) -> tuple[float, float]:
    """Seconds until the first token, and of the `new` tokens after it."""
    start = time.perf_counter()
    output = model(ids, use_cache=True)
    token = output.logits[:, -1:].argmax(-1)
    wait(model.device)
    first = time.perf_counter()
    for _ in range(new):
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    wait(model.device)
    return first - start, time.perf_counter() - first


def device_name(device: torch.device) -> str:
    """The GPU's name, or the number of the CPU's threads."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"
