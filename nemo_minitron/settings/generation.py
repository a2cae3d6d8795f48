"""Text that the teacher writes for its student: synthetic-data fine-tuning, as plain values."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_minitron.errors import InputError
from nemo_minitron.schema import seed_setting, setting
from nemo_minitron.settings.distillation import Distillation
from nemo_minitron.settings.validated import ValidatedSettings

WRITTEN = "the teacher writes its text within a job"


@dataclasses.dataclass(frozen=True)
class Generation(ValidatedSettings):
    """The model that the student learns from writes `documents` texts, and the student is trained on those instead
    of on the corpus: with the LM loss where distillation says logits_weight=0 and lm_weight=1, as in SDG fine-tuning,
    or with any other loss. 0 documents: nothing is written.

    A document is a prompt and what follows it, up to `new_tokens`, or to the end that the teacher makes, drawn at
    `temperature` from the likeliest tokens that together have probability `top_p`; both parts are learned. Prompts are
    windows of `prompt_tokens` of the training corpus, none over the end of a document, drawn by `seed`; or `prompts`,
    a text or JSONL file of them, taken in turn as often as need be. `batch_size` prompts of one length are continued
    at once. A search's brief distillations are still on the corpus.
    """

    documents: int = setting(0, "Texts that the teacher writes; 0: none.", least=0, recipe_only=WRITTEN)
    prompts: str = setting("", "Text or JSONL file of their prompts, instead of the corpus.", recipe_only=WRITTEN)
    prompt_tokens: int = setting(32, "Tokens of a prompt that is taken of the corpus.", recipe_only=WRITTEN)
    new_tokens: int = setting(224, "Tokens that follow a prompt, at most.", recipe_only=WRITTEN)
    temperature: float = setting(1.0, "Of the draws.", above_zero=True, recipe_only=WRITTEN)
    top_p: float = setting(0.95, "Drawn from the likeliest tokens of this probability.", recipe_only=WRITTEN)
    batch_size: int = setting(8, "Prompts that are continued at once.", recipe_only=WRITTEN)
    seed: int = seed_setting(recipe_only=WRITTEN)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1, which leaves no token out")

    @property
    def wanted(self) -> bool:
        return self.documents > 0

    def check(self, distillation: Distillation) -> None:
        """Raises InputError for prompts that are no file, and for a teacher that would be corrected by its own text."""
        if not self.wanted:
            return
        if self.prompts and not Path(self.prompts).is_file():
            raise InputError(f"generation.prompts '{self.prompts}' is no file; leave it empty to take the corpus'")
        if distillation.correction_tokens:
            raise InputError(
                f"correction_tokens={distillation.correction_tokens} would teach the teacher the text that it wrote "
                "itself (generation.documents); leave out one of them"
            )

    def words(self) -> str:
        """What is written, in a line."""
        start = f"a prompt of {self.prompts}" if self.prompts else f"{self.prompt_tokens} tokens of the corpus"
        return (
            f"the teacher writes {self.documents:,} documents, {start} and up to {self.new_tokens} of its own each "
            f"(temperature {self.temperature:g}, top-p {self.top_p:g}), which the student learns in the corpus' place"
        )
