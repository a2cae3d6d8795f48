"""What a cut of hidden channels must compute where a model multiplies its embeddings by sqrt(hidden_size), as Gemma.

transformers and Megatron take the multiplier from the config, so a student of fewer channels has a smaller one. What
the layers add to the residual stream does not shrink with it, because a norm stands behind each of them. So embeddings
alone would weigh less in the stream. The student's embeddings are therefore multiplied by sqrt(old / new): then each
channel that stays enters the first layer as in the teacher, and all else is plain selection, as in every family.

Where the output head is the same tensor, its logits would grow by that factor. The final norm, which stands before the
head alone, takes the inverse: (1 + w) sqrt(new / old). In real numbers both are exact, for each epsilon. The two
tensors are rounded once to the stored dtype. (The inverse factor on the norms behind attention and MLP would touch no
matrix, but it would scale the whole stream, so that each norm's epsilon would weigh more.) If a model rounds its
multiplier, as in bf16, the scale of the stream changes by what the two roundings differ in, at most 0.4%.
"""

from __future__ import annotations

import math

import numpy as np

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.artifacts.dtypes import as_numbers, as_stored

EMBEDDING, FINAL_NORM = "embedding.weight", "final_norm.weight"


def factor(plan: PrunePlan, name: str) -> float:
    """What the student's tensor is multiplied by, beside its selection (a norm's weight with its 1); 1.0: nothing."""
    a, b = plan.source, plan.target
    if not a.scaled_embeddings or a.hidden_size == b.hidden_size:
        return 1.0
    if name == EMBEDDING:
        return math.sqrt(a.hidden_size / b.hidden_size)
    return math.sqrt(b.hidden_size / a.hidden_size) if name == FINAL_NORM and a.tied_embeddings else 1.0


def times(values: np.ndarray, by: float, plan: PrunePlan, name: str) -> np.ndarray:
    """float64 numbers of a tensor times a factor; of a norm that is stored less 1, the 1 counts."""
    less = 1.0 if "norm" in name and plan.source.zero_centered_norms else 0.0
    return (values + less) * by - less


def rescaled(raw: np.ndarray, dtype: str, plan: PrunePlan, name: str, by: float) -> np.ndarray:
    """Raw bits of a part of the selected tensor -> those of the student's, times `by`."""
    return raw if by == 1.0 else as_stored(times(as_numbers(raw, dtype), by, plan, name), dtype)
