"""A student as its teacher's draft model: the share of its tokens that speculative decoding accepts (2211.17192).

Shapes: N windows, B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.evaluation.model import load
from nemo_minitron.evaluation.perplexity import POSITIONS, check_windows
from nemo_minitron.families import check_draft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST = 16  # most tokens that are drafted at once


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """`acceptance`: the mean over `positions` of the sum over the vocabulary of min(p, q), at temperature 1; `greedy`:
    the share of positions where both models' likeliest token is the same, which is accepted at temperature 0.

    `cost`: the draft's parameters over the target's; this is the relative cost of a token if decoding is memory-bound.
    """

    acceptance: float
    greedy: float
    positions: int
    cost: float

    @property
    def length(self) -> int:
        """The number of drafted tokens with the largest gain; 0 if drafting does not pay."""
        return max(range(MOST + 1), key=lambda count: (self.gain(count), -count))

    def gain(self, drafted: int) -> float:
        """The speed-up over the target alone, in tokens a second, if each position accepts as the mean does
        (2211.17192, theorem 3.8)."""
        tokens = sum(self.acceptance**accepted for accepted in range(drafted + 1))
        return tokens / (1 + drafted * self.cost)

    def as_dict(self) -> JsonObject:
        return dataclasses.asdict(self) | {"length": self.length, "gain": self.gain(self.length)}


def draft_acceptance(
    target: str | Path,
    draft: str | Path,
    windows: np.ndarray,
    *,
    precision: str = "bf16",
    batch_size: int = 4,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Acceptance:
    """Runs both Hugging Face folders over every position of `windows`, whole numbers [N, S], packed tokens.

    Probabilities are fp32 from the logits; sums are float64. `progress(windows done, N)` is called after each batch.

    Raises InputError if the vocabularies differ in size, the windows do not fit, or a model cannot be loaded.
    """
    theirs, ours = check_draft(target, draft)
    windows = check_windows(windows, theirs.vocab_size)
    models = load(target, precision), load(draft, precision)
    rows = [windows[first : first + batch_size] for first in range(0, len(windows), batch_size)]
    sums = []
    for batch in rows:
        sums.append(_sums(models, batch))
        progress(min(len(sums) * batch_size, len(windows)), len(windows))
    accepted, same = (math.fsum(column) / windows.size for column in zip(*sums, strict=True))
    return Acceptance(accepted, same, windows.size, ours.parameters() / theirs.parameters())


def _sums(models: tuple[PreTrainedModel, PreTrainedModel], windows_BS: np.ndarray) -> tuple[float, float]:
    """Sums over a batch's positions: of min(p, q), and of the positions where both models prefer the same token."""
    import torch

    tokens_BS = torch.from_numpy(windows_BS).to(models[0].device)
    accepted, same = 0.0, 0.0
    with torch.inference_mode():
        both = [model(input_ids=tokens_BS, use_cache=False).logits.flatten(0, 1) for model in models]
        for first in range(0, len(both[0]), POSITIONS):
            p_TV, q_TV = (logits[first : first + POSITIONS].float().softmax(-1) for logits in both)
            accepted += torch.minimum(p_TV, q_TV).sum(-1, dtype=torch.float64).sum().item()
            same += (p_TV.argmax(-1) == q_TV.argmax(-1)).sum().item()
    return accepted, same
