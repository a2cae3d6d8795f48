"""Text that the teacher writes for its student: synthetic-data fine-tuning, as plain values."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_minitron.errors import InputError
from nemo_minitron.schema import seed_setting, setting
from nemo_minitron.settings.distillation import Distillation
from nemo_minitron.settings.validated import ValidatedSettings

WRITTEN = "only a job lets the teacher write text"


@dataclasses.dataclass(frozen=True)
class Generation(ValidatedSettings):
    """The model that the student learns from writes `documents` texts, and the student is trained on them instead of on
    the corpus. Any loss can be used; SDG fine-tuning is the LM loss (logits_weight=0 and lm_weight=1 of distillation).
    0 documents: nothing is written.

    A document is a prompt and a continuation of up to `new_tokens` tokens, which the teacher may end early. Each
    token is drawn at `temperature` from the likeliest tokens that together have probability `top_p`. The student learns
    both parts. Prompts are windows of `prompt_tokens` tokens of the training corpus, drawn by `seed`; none crosses the
    end of a document. Or `prompts` names a text or JSONL file of prompts, which are taken in turn and repeated as often
    as needed. `batch_size` prompts of one length are continued at once. The brief distillations of a search still read
    the corpus.

    Raises InputError for a number out of range.
    """

    documents: int = setting(0, "Texts that the teacher writes; 0: none.", least=0, recipe_only=WRITTEN)
    prompts: str = setting("", "Text or JSONL file of prompts. Default: windows of the corpus.", recipe_only=WRITTEN)
    prompt_tokens: int = setting(32, "Tokens of a prompt that is taken from the corpus.", recipe_only=WRITTEN)
    new_tokens: int = setting(224, "Tokens that continue a prompt, at most.", recipe_only=WRITTEN)
    temperature: float = setting(1.0, "Temperature of the draws.", above_zero=True, recipe_only=WRITTEN)
    top_p: float = setting(
        0.95, "Draw from the likeliest tokens that together have this probability.", recipe_only=WRITTEN
    )
    batch_size: int = setting(8, "Prompts that are continued at once.", recipe_only=WRITTEN)
    seed: int = seed_setting(recipe_only=WRITTEN)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1, which leaves no token out")

    @property
    def wanted(self) -> bool:
        """Whether the teacher writes anything."""
        return self.documents > 0

    def check(self, distillation: Distillation, positions: int | None = None) -> None:
        """Raises InputError if `prompts` is no file, for a document that is longer than the `positions` of the model
        that writes it (None: unknown), and for a teacher correction on the teacher's own text."""
        if not self.wanted:
            return
        prompt = 0 if self.prompts else self.prompt_tokens
        if positions and prompt + self.new_tokens > positions:
            raise InputError(
                f"a document has up to {prompt + self.new_tokens} tokens (generation.prompt_tokens and new_tokens), "
                f"but the model has {positions} positions; the nearest legal new_tokens is {max(1, positions - prompt)}"
            )
        if self.prompts and not Path(self.prompts).is_file():
            raise InputError(
                f"generation.prompts '{self.prompts}' is no file; leave it empty to take prompts from the corpus"
            )
        if distillation.correction_tokens:
            raise InputError(
                f"correction_tokens={distillation.correction_tokens} would teach the teacher the text that it wrote "
                "itself (generation.documents); leave out one of them"
            )

    def describe(self) -> str:
        """What is written, in one line."""
        start = f"a prompt of {self.prompts}" if self.prompts else f"{self.prompt_tokens} tokens of the corpus"
        return (
            f"the teacher writes {self.documents:,} documents, each {start} and up to {self.new_tokens} tokens of its "
            f"own (temperature {self.temperature:g}, top-p {self.top_p:g}); the student learns them, not the corpus"
        )
