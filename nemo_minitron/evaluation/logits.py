"""What a model answers at a few positions of each window, to tell whether two models are the same.

Shapes: N windows, P kept positions of a window, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.model import load
from nemo_minitron.evaluation.perplexity import check_windows, seen_of
from nemo_minitron.evaluation.windows import Windows
from nemo_minitron.families import from_hf

POSITIONS = 16  # of a window, whose logits are kept: each sees all tokens before it; at V = 128k they take 8 MB


@dataclasses.dataclass(frozen=True)
class Answers:
    """`windows`: losses and likeliest tokens of each window. `logits_NPV`: fp32, at the kept positions."""

    windows: Windows
    logits_NPV: np.ndarray

    def apart(self, other: Answers) -> float:
        """The root mean square difference of two models' logits, as a share of the standard deviation of this one's.
        0: they are the same model; about 1 or more: they have nothing in common."""
        differing = np.sqrt(np.mean((self.logits_NPV - other.logits_NPV) ** 2, dtype=np.float64))
        return float(differing / self.logits_NPV.std(dtype=np.float64))


def answers(folder: str | Path, windows: np.ndarray, *, precision: str = "fp32", batch_size: int = 4) -> Answers:
    """Runs a Hugging Face folder over packed windows, whole numbers [N, S]. The kept positions lie evenly, the last one
    among them. Raises InputError as `evaluate`."""
    import torch

    windows = check_windows(windows, from_hf(folder).vocab_size)
    length = windows.shape[1]
    kept = np.unique(np.linspace(0, length - 1, min(POSITIONS, length)).round().astype(int))
    model, rows, logits = load(folder, precision), [], []
    for first in range(0, len(windows), batch_size):
        tokens_BS = torch.from_numpy(windows[first : first + batch_size]).to(model.device)
        with torch.inference_mode():
            logits_BSV = model(input_ids=tokens_BS, use_cache=False).logits
            rows += [seen_of(logits_SV, tokens_S) for logits_SV, tokens_S in zip(logits_BSV, tokens_BS, strict=True)]
            logits.append(logits_BSV[:, kept].float().cpu().numpy())
    seen = Windows(np.array([nats for nats, _ in rows]), np.stack([likeliest for _, likeliest in rows]))
    found = Answers(seen, np.concatenate(logits))
    if not (np.isfinite(found.logits_NPV).all() and np.isfinite(seen.nats_N).all()):
        raise InputError(f"the model '{folder}' gives logits that are not finite; its weights are damaged")
    return found
