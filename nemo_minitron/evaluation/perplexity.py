"""Loss, perplexity and bits per byte of a Hugging Face folder on packed windows of tokens.

Shapes: N windows, B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.model import load
from nemo_minitron.evaluation.windows import Windows, standard_error
from nemo_minitron.families import from_hf

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

POSITIONS = 512  # positions whose logits are in fp32 at once; at V = 128k they and their softmax take 0.5 GB
LARGEST_LOSS = 700.0  # exp of a larger loss overflows a float, and JSON has no infinity


@dataclasses.dataclass(frozen=True)
class Numbers:
    """One row of `numbers.json`.

    `tokens`: predicted positions; `loss`: nats per predicted token; `bits_per_byte`: None if the bytes of the tokens
    are not known; `seconds`: of the forward passes, without the time to load the model; `loss_error`: standard error of
    the loss over windows, None for a single one; `windows`: what the model says of each window, which is no part of a
    row.
    """

    corpus: str
    tokens: int
    parameters: int
    loss: float
    perplexity: float
    bits_per_byte: float | None
    seconds: float
    stage: str = ""
    loss_error: float | None = None
    windows: Windows | None = None

    @classmethod
    def from_totals(cls, nats: float, tokens: int, text_bytes: int | None = None, **rest: Any) -> Numbers:
        """Makes the numbers from sums over all predicted positions; `rest`: the fields that do not follow from the
        sums."""
        loss = nats / tokens
        bits = nats / math.log(2) / text_bytes if text_bytes else None
        perplexity = math.exp(min(loss, LARGEST_LOSS))
        return cls(tokens=tokens, loss=loss, perplexity=perplexity, bits_per_byte=bits, **rest)

    def as_dict(self) -> JsonObject:
        """Plain values, `stage` and `corpus` first."""
        values = dataclasses.asdict(dataclasses.replace(self, windows=None))
        del values["windows"]
        return {"stage": values.pop("stage")} | values


def evaluate(
    folder: str | Path,
    windows: np.ndarray,
    *,
    token_bytes: np.ndarray | None = None,
    precision: str = "bf16",
    batch_size: int = 4,
    corpus: str = "",
    stage: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Numbers:
    """Mean cross entropy of each next token over positions 1 to S-1 of each window.

    `windows`: whole numbers [N, S], packed tokens without padding. `token_bytes`: whole numbers [V], UTF-8
    bytes of each token. `precision`: bf16 or fp32, of the forward pass; the loss is computed in fp32 from the
    logits and is summed in float64. `progress(windows done, N)` is called after each batch. The batch size changes the
    result only by rounding, because nothing is padded.

    Raises InputError if the windows do not fit the model, the model cannot be loaded, or its logits are not finite.
    """
    architecture = from_hf(folder)
    windows = check_windows(windows, architecture.vocab_size)
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    text_bytes = None if token_bytes is None else predicted_bytes(windows, token_bytes)
    seen, seconds = _measured(folder, windows, precision, batch_size, progress)
    rest = {"corpus": corpus, "stage": stage, "parameters": architecture.parameters(), "seconds": seconds}
    rest |= {"loss_error": standard_error(seen.losses_N), "windows": seen}
    # The sum is exactly rounded, so that it does not depend on the batches.
    return Numbers.from_totals(math.fsum(seen.nats_N), windows[:, 1:].size, text_bytes, **rest)


def _measured(
    folder: str | Path, windows: np.ndarray, precision: str, batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[Windows, float]:  # fmt: skip
    """What the model says of each window, and the seconds of the forward passes."""
    model = load(folder, precision)
    start = time.perf_counter()
    seen = _seen(model, windows, batch_size, progress)
    if not np.isfinite(seen.nats_N).all():
        raise InputError(f"the model '{folder}' gives logits that are not finite; its weights are damaged")
    return seen, round(time.perf_counter() - start, 3)


def _seen(
    model: PreTrainedModel, windows: np.ndarray, batch_size: int, progress: Callable[[int, int], None] | None
) -> Windows:
    rows: list[tuple[float, np.ndarray]] = []
    for first in range(0, len(windows), batch_size):
        rows += _batch(model, windows[first : first + batch_size])
        if progress:
            progress(len(rows), len(windows))
    return Windows(np.array([nats for nats, _ in rows]), np.stack([likeliest for _, likeliest in rows]))


def _batch(model: PreTrainedModel, windows_BS: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """For each row its summed cross entropy in nats, and the likeliest token at each position."""
    import torch

    tokens_BS = torch.from_numpy(windows_BS).to(model.device)
    with torch.inference_mode():
        logits_BSV = model(input_ids=tokens_BS, use_cache=False).logits
        return [seen_of(logits_BSV[row], tokens_BS[row]) for row in range(len(tokens_BS))]


def seen_of(logits_SV: torch.Tensor, tokens_S: torch.Tensor) -> tuple[float, np.ndarray]:
    """The summed cross entropy of a row, where position i predicts token i + 1, and the likeliest token of each
    position, int32; in chunks, to avoid an fp32 copy of all logits."""
    import torch
    from torch.nn.functional import cross_entropy

    total, likeliest = 0.0, []
    for first in range(0, len(tokens_S) - 1, POSITIONS):
        last = min(first + POSITIONS, len(tokens_S) - 1)
        targets = tokens_S[first + 1 : last + 1]
        nats = cross_entropy(logits_SV[first:last].float(), targets, reduction="none")
        total += nats.double().sum().item()
        likeliest.append(logits_SV[first:last].argmax(-1))
    return total, torch.cat(likeliest).int().cpu().numpy()


def check_windows(windows: np.ndarray, vocab_size: int) -> np.ndarray:
    """`windows` as int64 [N, S]. Raises InputError if they have another form, or do not fit the vocabulary."""
    windows = np.ascontiguousarray(windows)
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 2 or windows.dtype.kind not in "iu":
        raise InputError(
            f"windows are {windows.dtype} {list(windows.shape)}; whole numbers [windows, sequence] are "
            "needed, at least one window of at least 2 tokens"
        )
    windows = windows.astype(np.int64, copy=False)
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"token {low if low < 0 else high} is outside the model's vocabulary (0 to {vocab_size - 1}); "
            "the text was made with another tokenizer"
        )
    return windows


def predicted_bytes(windows: np.ndarray, token_bytes: np.ndarray) -> int:
    """The UTF-8 bytes of the predicted tokens, which are all but the first of each window."""
    token_bytes = np.asarray(token_bytes)
    if token_bytes.ndim != 1 or len(token_bytes) <= windows.max():
        raise InputError(
            f"token_bytes has {token_bytes.shape} entries; the text has token {windows.max()}, so "
            f"[{windows.max() + 1}] or more are needed"
        )
    return int(token_bytes[windows[:, 1:]].sum(dtype=np.int64))
