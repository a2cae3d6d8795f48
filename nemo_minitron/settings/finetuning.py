"""How a distilled student is tuned on instructions, as plain values."""

from __future__ import annotations

import dataclasses

from nemo_minitron.errors import InputError
from nemo_minitron.schema import MODEL, OUTPUT, seed_setting, setting
from nemo_minitron.settings.distillation import Distillation
from nemo_minitron.settings.validated import ValidatedSettings, precision_setting


@dataclasses.dataclass(frozen=True)
class Finetuning(ValidatedSettings):
    """Supervised fine-tuning on prompts and answers in the host's own loop. The loss counts the answers alone;
    a mixture of experts adds the routers' loss that its config names.

    If a row is longer than `sequence_length` tokens, its prompt is cut. The learning rate rises over `warmup_steps` and
    falls as a cosine until the last of `steps`. `save_every` counts steps.

    Raises InputError for a number out of range, an unknown name, and a `prompt_template` without its two places.
    """

    steps: int = setting(1000, "Steps of the training.")
    sequence_length: int = setting(
        4096, "Length of a row in tokens, at most; a longer row loses part of its prompt.", derived=True, panel=MODEL
    )
    global_batch_size: int = setting(128, "Rows of a step, over all ranks.", derived=True)
    micro_batch_size: int = setting(1, "Rows of a micro-batch, on each rank.")
    learning_rate: float = setting(1e-5, "Learning rate at its peak.", above_zero=True)
    min_learning_rate: float = setting(1e-6, "Learning rate at the last step; it falls as a cosine.", derived=True)
    warmup_steps: int = setting(50, "Steps until the learning rate reaches its peak.", least=0)
    weight_decay: float = setting(0.1, "Weight decay of the optimizer.")
    prompt_template: str = setting(
        "{input} {output}", "Template of a row: it has {input} and ends with {output}.", panel=MODEL
    )
    precision: str = precision_setting("bf16")
    save_every: int = setting(500, "Steps between checkpoints.", panel=OUTPUT)
    seed: int = seed_setting()

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{input}" not in self.prompt_template or not self.prompt_template.endswith("{output}"):
            raise InputError(
                f"prompt_template '{self.prompt_template}' must hold {{input}} and end with {{output}}, for example "
                "'{input} {output}'"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch, at most: a shorter row is not filled up."""
        return self.sequence_length * self.global_batch_size

    def training(self) -> Distillation:
        """The same steps as a training without a teacher, from which optimizer, schedule and logger are made."""
        return Distillation(
            tokens=self.steps * self.tokens_per_step, sequence_length=self.sequence_length,
            global_batch_size=self.global_batch_size, micro_batch_size=self.micro_batch_size,
            learning_rate=self.learning_rate, min_learning_rate=self.min_learning_rate,
            warmup_steps=self.warmup_steps, weight_decay=self.weight_decay, logits_weight=0.0, lm_weight=1.0,
            precision=self.precision, save_every=self.save_every, seed=self.seed,
        )  # fmt: skip
