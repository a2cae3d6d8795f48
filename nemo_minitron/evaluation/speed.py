"""How fast a model answers on this machine: the time until its first token, and the tokens that follow in a second."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.evaluation.latency import wait
from nemo_minitron.evaluation.model import load
from nemo_minitron.families import from_hf

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROMPT, NEW = 256, 16  # tokens of the prompt, and tokens written after it
LONGEST = 60  # seconds after which no further round begins


def speeds(
    models: Mapping[str, str | Path], *, precision: str = "bf16", prompt: int = PROMPT, new: int = NEW, repeat: int = 3
) -> dict[str, JsonObject]:  # fmt: skip
    """For each of `models` (name -> folder): seconds until the first token after `prompt` tokens (`latency`), and
    tokens a second of the `new` ones after it, one sequence, greedy; the medians of up to `repeat` rounds, after one
    pass to warm up. Also the precision, the `device`, and whether the models took turns.

    They take turns if memory holds them all, so that what else the machine does slows each of them alike. It is
    transformers' time, not that of a serving engine, so use it to compare models. Raises InputError as `load`.
    """
    if _fit_together(models.values()):
        return _in_turn(models, precision, prompt, new, repeat)
    each = [_in_turn({name: folder}, precision, prompt, new, repeat) for name, folder in models.items()]
    return {name: row | {"in_turn": False} for one in each for name, row in one.items()}


def _in_turn(
    models: Mapping[str, str | Path], precision: str, prompt: int, new: int, repeat: int
) -> dict[str, JsonObject]:  # fmt: skip
    import torch

    loaded = {name: load(folder, precision) for name, folder in models.items()}
    positions = [getattr(model.config, "max_position_embeddings", None) or prompt + new for model in loaded.values()]
    prompt = max(1, min(prompt, min(positions) - new))
    generator, rows = torch.Generator().manual_seed(0), min(model.config.vocab_size for model in loaded.values())
    ids = torch.randint(rows, (1, prompt), generator=generator)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in loaded}
    with torch.inference_mode():
        for model in loaded.values():
            model(ids.to(model.device), use_cache=False)
        begun = time.monotonic()
        for number in range(repeat):
            if number and time.monotonic() - begun > LONGEST:
                break
            for name, model in loaded.items():
                runs[name].append(_answer(model, ids.to(model.device), new))
    rest: JsonObject = {"prompt": prompt, "new": new, "precision": precision, "in_turn": True}
    return {
        name: {
            "latency": statistics.median(first for first, _ in times),
            "tokens_per_second": new / statistics.median(after for _, after in times),
            **rest,
            "device": device_name(loaded[name].device),
        }
        for name, times in runs.items()
    }


def _fit_together(folders: Iterable[str | Path]) -> bool:
    """Whether the weights of all these models take at most half of the free memory of the device that runs them."""
    import torch

    needed = sum(4 * from_hf(folder).parameters() for folder in folders)  # bytes, of at most fp32
    if torch.cuda.is_available():
        return needed <= torch.cuda.mem_get_info()[0] / 2
    return needed <= os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2


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
