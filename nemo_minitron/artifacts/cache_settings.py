"""What decides the numbers of a logit cache. Plain values, without numpy."""

from __future__ import annotations

import dataclasses

from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.errors import InputError, nearest
from nemo_minitron.precisions import PRECISIONS
from nemo_minitron.schema import MODEL, seed_setting, setting

MODES = ("sample", "top-k")
MANY = 65535  # draws or tokens at a position


@dataclasses.dataclass(frozen=True)
class CacheSettings:
    """The settings that decide a cache's numbers, beside model and text. Raises InputError for an illegal value.

    `mode` "sample": at each position `draws` tokens from q, where q is proportional to p^(1 / `proposal_temperature`)
    and p = softmax(logits / `temperature`) is the target (RS-KD, 2503.16870). A token's weight is count / draws *
    p / q and is never normalised, so that the expectation of the target is p. At proposal temperature 1, q is p and
    the count suffices. `independent`: independent draws, as in the paper; otherwise one draw from each `draws`-th of
    the distribution, which has the same expectation and less noise. `sets`: the number of independent sets of draws;
    epoch e uses set e % sets. `mode` "top-k": the `k` largest p, and the mass of all other tokens.
    `sequence_length`: tokens of a row. `precision`: of the teacher's forward pass.
    """

    sequence_length: int = setting(4096, "Length of a row, in tokens.", derived=True, panel=MODEL)
    mode: str = setting(
        "sample",
        "What is kept: sample (random draws, unbiased), or top-k (the largest, and the mass of the rest).",
        legal=MODES,
    )
    draws: int = setting(50, "With --mode sample: the number of tokens drawn at each position.", most=MANY)
    independent: bool = setting(
        False, "Draw independently, as RS-KD does, instead of one token from each part of the distribution."
    )
    proposal_temperature: float = setting(
        1.0, "Temperature T of the proposal p^(1/T); any value but 1 takes 4 more bytes a token.", above_zero=True
    )
    sets: int = setting(1, "Number of sets of draws; epoch e of a training uses set e mod SETS.", most=MANY)
    seed: int = seed_setting(most=2**63 - 1)
    k: int = setting(64, "With --mode top-k: the number of tokens kept at each position.", most=MANY)
    temperature: float = setting(1.0, "Temperature of the distillation loss.", above_zero=True)
    precision: str = setting(
        "bf16", f"Precision of the model: {', '.join(PRECISIONS)}, or auto.", legal=(*PRECISIONS, "auto")
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, known = getattr(self, field.name), field.metadata["setting"]
            if known.legal and value not in known.legal:
                raise InputError(f"{field.name} '{value}' is unknown; {nearest(value, known.legal)}")
            if field.type == "int" and not known.least <= value <= known.most:
                legal = min(max(value, known.least), known.most)
                raise InputError(f"{field.name} is {value}; the nearest legal value is {legal}")
            if field.type == "float" and not 0 < value < float("inf"):
                raise InputError(f"{field.name} is {value}; it must be a number above 0")

    @property
    def sampled(self) -> bool:
        return self.mode == "sample"

    @property
    def stored_sets(self) -> int:
        return self.sets if self.sampled else 1

    def identity(self) -> JsonObject:
        """The fields that decide the numbers in this mode."""
        other = ("k",) if self.sampled else ("draws", "independent", "proposal_temperature", "sets", "seed")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in other}
