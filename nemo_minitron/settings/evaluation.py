"""The corpora that a job reads and what it measures, as plain values."""

from __future__ import annotations

import dataclasses

from nemo_minitron.errors import InputError
from nemo_minitron.precisions import WIDE
from nemo_minitron.schema import MODEL, TOKENS, known_as, setting
from nemo_minitron.settings.validated import ValidatedSettings, precision_setting

GIVEN = "commands take their text as --data"
OPTION = "commands have an option of this name"
CARD = "only the cards and reports of a job show it"
JOB = "only a job does this"
ALONG = ("every", "texts", "every_benchmarks")


@dataclasses.dataclass(frozen=True)
class Data:
    """Corpora: text, JSONL, a `datasets` name or folder, or a `.bin/.idx` prefix.

    A `datasets` source is NAME[:CONFIGURATION][@SPLIT], for example `Salesforce/wikitext:wikitext-2-raw-v1@validation`.
    Without @SPLIT, `train` and `calibration` are its train split and `test` is its test split. A split that the source
    lacks is refused, and no other one takes its place.
    """

    train: str = dataclasses.field(metadata=known_as("Text that the student learns.", recipe_only=GIVEN))
    test: str = dataclasses.field(metadata=known_as("Held-out text that models are measured on.", recipe_only=GIVEN))
    calibration: str | None = setting(None, "Text that the teacher is scored on. Default: as train.", recipe_only=GIVEN)
    name: str = setting("corpus", "Name of the text in cards and reports.", recipe_only=CARD)
    licence: str = setting("unknown", "Licence of the text.", recipe_only=CARD)
    teachers_own: bool = setting(
        False, "Whether the teacher was trained on this text, so that it needs no correction.", recipe_only=CARD
    )
    skip_bad_lines: bool = setting(False, "Leave out lines that cannot be read, and say how many.", recipe_only=OPTION)


@dataclasses.dataclass(frozen=True)
class Evaluation(ValidatedSettings):
    """Perplexity on held-out text, and greedy continuations of prompts.

    `every`: the distillation stops at a checkpoint after every so many tokens (whole steps), and the student is
    measured on the same rows of data.test and of `texts`, and on `every_benchmarks`; then it resumes. Raises InputError
    for texts or benchmarks without `every`.
    """

    tokens: int = setting(16_384, "Tokens of the held-out text to measure on, at most.", most=TOKENS, panel=MODEL)
    sequence_length: int = setting(512, "Length of a row, in tokens.", derived=True, panel=MODEL)
    batch_size: int = setting(4, "Rows that are measured at once.")
    precision: str = precision_setting("bf16", WIDE)
    random_baseline: bool = setting(True, "Also measure a student that is cut at random.", recipe_only=JOB)
    slices_baseline: bool = setting(
        True, "Also measure the plain cut, without re-fitted matrices and scaled norms.", recipe_only=JOB
    )
    prompts: tuple[str, ...] = setting((), "Texts that teacher and student continue.", recipe_only=JOB)
    new_tokens: int = setting(48, "Tokens of a continuation, at most.", recipe_only=JOB)
    benchmarks: tuple[str, ...] = setting(
        (),
        "Benchmarks of teacher and student: base, instruct, names such as MMLU, lm-eval's tasks, or their FILE.yaml.",
        recipe_only="evaluate has --tasks",
    )
    every: int = setting(
        0, "Tokens of the distillation between two measurements of the student; 0: none.", least=0, most=TOKENS,
        recipe_only=JOB,
    )  # fmt: skip
    texts: tuple[str, ...] = setting(
        (), "Held-out texts of other domains, which `every` measures beside data.test.", recipe_only=JOB
    )
    every_benchmarks: tuple[str, ...] = setting(
        (), "Benchmarks that `every` measures, too, by the names of `benchmarks`.", recipe_only=JOB
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("texts", "every_benchmarks"):
            if getattr(self, name) and not self.every:
                raise InputError(
                    f"evaluation.{name} are measured along the distillation; set evaluation.every, the tokens between "
                    "two measurements, for example evaluation.every=1M"
                )
        if len(set(self.texts)) < len(self.texts):
            raise InputError("evaluation.texts names a text twice; name each once")

    def deciding(self) -> dict[str, object]:
        """Name -> value of the settings that decide the numbers of one model, not what is measured along a training."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in ALONG}
