"""What groups of a recipe's settings have in common: whole numbers count something, names are known ones."""

from __future__ import annotations

import dataclasses

from nemo_minitron.errors import InputError, nearest
from nemo_minitron.precisions import PRECISIONS

LEGAL = {
    "norms": ("all", "layers"),
    "loss": ("forward_kl", "reverse_kl", "jensen_shannon", "top_k_kl", "cosine", "mse"),
    "intermediate_loss": ("cosine", "mse"),
    "start": ("pruned", "random"),
    "teacher_precision": ("", *PRECISIONS),
}
FROM_ZERO = (
    "seed", "warmup_steps", "warmup_tokens", "remove", "correction_tokens", "correction_warmup_steps", "validate_every",
    "patience", "documents",
)  # fmt: skip


class Counted:
    """Settings whose whole numbers are at least 1, but for seeds and what may be left out."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            least = 0 if field.name in FROM_ZERO else 1
            if field.type == "int" and value < least:
                raise InputError(f"{field.name} is {value}; the nearest legal value is {least}")
            if field.name in LEGAL and value not in LEGAL[field.name]:
                raise InputError(f"{field.name} '{value}' is unknown; {nearest(value, LEGAL[field.name])}")
            if field.name in ("learning_rate", "correction_learning_rate", "temperature") and not value > 0:
                raise InputError(f"{field.name} is {value}; it must be above 0")
