"""What is read and what is measured, as plain values: a job's corpora and its evaluation."""

from __future__ import annotations

import dataclasses

from nemo_minitron.precisions import WIDE
from nemo_minitron.schema import MODEL, TOKENS, known_as, setting
from nemo_minitron.settings.validated import ValidatedSettings, precision_setting

GIVEN = "a command takes its text as --data"
OPTION = "commands have an option of this name"
CARD = "for the cards and reports of a job"
JOB = "a job alone compares, continues and reports"


@dataclasses.dataclass(frozen=True)
class Data:
    """Corpora: text, JSONL, a `datasets` name or folder, or a `.bin/.idx` prefix.

    A `datasets` source is NAME[:CONFIGURATION][@SPLIT], for example `Salesforce/wikitext:wikitext-2-raw-v1@validation`.
    Without @SPLIT `train` and `calibration` are its train split, `test` its test split, never silently another.
    """

    train: str = dataclasses.field(metadata=known_as("Text that the student learns.", recipe_only=GIVEN))
    test: str = dataclasses.field(metadata=known_as("Text that models are measured on.", recipe_only=GIVEN))
    calibration: str | None = setting(
        None, "Text that the teacher is scored on; as train unless given.", recipe_only=GIVEN
    )
    name: str = setting("corpus", "What cards and reports call the text.", recipe_only=CARD)
    licence: str = setting("unknown", "Of the text.", recipe_only=CARD)
    teachers_own: bool = setting(
        False, "The teacher was trained on this text, so that no correction is called for.", recipe_only=CARD
    )
    skip_bad_lines: bool = setting(False, "Leave out lines that cannot be read, and count them.", recipe_only=OPTION)


@dataclasses.dataclass(frozen=True)
class Evaluation(ValidatedSettings):
    """Perplexity on held-out text, and greedy continuations of prompts."""

    tokens: int = setting(16_384, "Tokens of the held-out text, at most.", most=TOKENS, panel=MODEL)
    sequence_length: int = setting(512, "Tokens of a sample.", panel=MODEL)
    batch_size: int = setting(4, "Samples that are measured at once.")
    precision: str = precision_setting("bf16", WIDE)
    random_baseline: bool = setting(True, "Measure a cut at random too.", recipe_only=JOB)
    prompts: tuple[str, ...] = setting((), "Texts that teacher and student continue.", recipe_only=JOB)
    new_tokens: int = setting(48, "Tokens of a continuation.", recipe_only=JOB)
    benchmarks: tuple[str, ...] = setting(
        (), "Of teacher and student: base, instruct or names that lm-eval has.", recipe_only="evaluate has --tasks"
    )
