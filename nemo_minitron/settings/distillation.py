"""How a student is retrained, as plain values: what it learns from, for how long, and what is checked on the way."""

from __future__ import annotations

import dataclasses

from nemo_minitron.architecture import Architecture
from nemo_minitron.distillation.layer_map import AUTO, layer_map
from nemo_minitron.errors import InputError
from nemo_minitron.precisions import PRECISIONS
from nemo_minitron.schema import MODEL, OUTPUT, TOKENS, seed_setting, setting
from nemo_minitron.settings.fp8 import check_tokens
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.validated import ValidatedSettings, precision_setting

LOSSES = ("forward_kl", "reverse_kl", "jensen_shannon", "top_k_kl", "cosine", "mse")
STARTS = ("pruned", "random")


@dataclasses.dataclass(frozen=True)
class Distillation(ValidatedSettings):
    """Retraining from the teacher's outputs; `tokens` are those of all steps. `save_every` counts steps.

    `precision`: fp32, bf16, fp8-delayed, fp8-current, fp8-blockwise, or auto (bf16 where the machine is good at it);
    `teacher_precision`: the teacher's, the same where it is left empty; not fp8-delayed under Transformer Engine,
    whose scales move in training alone. `offload_teacher`: its layers lie in the CPU's memory between steps.

    The loss is `logits_weight` * `loss` (a name in `distillation.losses`) + `lm_weight` * the language-model loss;
    with logits_weight=0 the latter alone, the baseline. `intermediate`: "auto" or pairs of states
    (`distillation.layer_map`), compared by `intermediate_loss`; `intermediate_weight` 0 is the paper's dynamic alpha.
    `start`: pruned, or random, the baseline that learns from nothing.

    `moe_aux_loss_coeff`, of a mixture of experts: so much of the routers' load-balancing loss is added, summed over
    layers, as Megatron's setting of that name does; a distillation's own, whatever the model's config says (Mixtral's
    router_aux_loss_coef), and 0 unless asked for, since a student that learns from its teacher's logits learns its
    routing from them.

    `teacher_cache`: a folder of `minitron cache-logits`, learned from in the place of a teacher and of `loss`, which
    is a cross-entropy against draws or the KL of the largest, as the cache was made; `temperature` must be its own.

    `correction_tokens`: teacher correction, so many tokens of the data are first learned by the teacher itself
    (LM loss, peak at `correction_learning_rate`, reached over `correction_warmup_steps`, or as the student's where
    those are 0); the corrected one is distilled. The learning rate rises over
    `warmup_tokens`, or over `warmup_steps` where those are 0, and falls as a cosine until the last token.
    `validate_every` steps the LM loss on `validation_batches` global batches of held-out text is taken; where it has
    not fallen for `patience` times in a row, training ends. 0 leaves either out.
    """

    tokens: int = setting(1_000_000, "Tokens of all steps together.", most=TOKENS, panel=MODEL)
    sequence_length: int = setting(4096, "Tokens of a sample.", derived=True, panel=MODEL)
    global_batch_size: int = setting(1, "Rows of a step, over all ranks.", derived=True)
    micro_batch_size: int = setting(1, "Rows that a rank takes at once.")
    learning_rate: float = setting(1e-4, "At its peak.", above_zero=True)
    min_learning_rate: float = setting(1e-5, "At the last token; it falls as a cosine.", derived=True)
    warmup_steps: int = setting(40, "Steps until the learning rate is at its peak.", least=0)
    warmup_tokens: int = setting(0, "Tokens until then, instead of steps.", least=0, most=TOKENS)
    weight_decay: float = setting(0.1, "Of the optimizer.")
    loss: str = setting("forward_kl", "On logits: " + ", ".join(LOSSES) + ".", legal=LOSSES)
    temperature: float = setting(1.0, "Of the loss; a cache's must agree.", above_zero=True)
    top_k: int = setting(100, "Of --loss top_k_kl: tokens of the teacher that are compared one by one.")
    logits_weight: float = setting(1.0, "Of the loss on logits; 0: the LM loss alone.")
    lm_weight: float = setting(0.0, "Of the language-model loss.")
    moe_aux_loss_coeff: float = setting(0.0, "Of routers' load balancing, in a mixture of experts.")
    intermediate: str = setting("", "States that are compared: auto, or pairs such as block:13:29.")
    intermediate_loss: str = setting("cosine", "By what they are compared: cosine or mse.", legal=("cosine", "mse"))
    intermediate_weight: float = setting(0.0, "Of their loss; 0: the paper's dynamic one.")
    start: str = setting("pruned", "pruned, or random: the baseline that learns from nothing.", legal=STARTS)
    correction_tokens: int = setting(0, "First learned by the teacher itself.", least=0, most=TOKENS)
    correction_learning_rate: float = setting(2e-5, "The peak of the teacher's own.", above_zero=True)
    correction_warmup_steps: int = setting(0, "The teacher's own; 0: as the student's.", least=0)
    precision: str = precision_setting("bf16")
    teacher_precision: str = setting("", "The teacher's own; as --precision unless given.", legal=("", *PRECISIONS))
    offload_teacher: bool = setting(False, "The teacher's layers lie in the CPU's memory between steps.")
    teacher_cache: str = setting("", "Folder of minitron cache-logits, in the teacher's place.", panel=MODEL)
    validate_every: int = setting(0, "Steps between two validations; 0: none.", least=0)
    validation_batches: int = setting(4, "Global batches of held-out text that a validation takes.")
    patience: int = setting(0, "Validations without a lower loss; then it ends. 0: never.", least=0)
    save_every: int = setting(100, "Steps between checkpoints.", panel=OUTPUT)
    seed: int = seed_setting()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.logits_weight or self.lm_weight):
            raise InputError("logits_weight and lm_weight are both 0; at least one must be above")
        if self.patience and not self.validate_every:
            raise InputError(f"patience={self.patience} needs validate_every, the steps between two validations")
        for name in ("intermediate", "correction_tokens") if self.teacher_cache else ():
            if getattr(self, name):
                raise InputError(f"{name} needs a teacher that runs, not one from teacher_cache; leave out one of them")
        if self.teacher_cache and not self.logits_weight:
            raise InputError("logits_weight is 0: nothing would be learned from teacher_cache; leave out one of them")

    @property
    def tokens_per_step(self) -> int:
        return self.sequence_length * self.global_batch_size

    @property
    def steps(self) -> int:
        return max(1, self.tokens // self.tokens_per_step)

    @property
    def warmup(self) -> int:
        """Steps until the peak of the learning rate."""
        return self.warmup_tokens // self.tokens_per_step if self.warmup_tokens else self.warmup_steps

    @property
    def learns_from_teacher(self) -> bool:
        """Whether a teacher runs beside the student."""
        return not self.teacher_cache and bool(self.logits_weight or self.intermediate)

    def check_batch(self, layout: Layout) -> None:
        """Raises InputError for a global batch that the layout cannot deal out."""
        at_once = layout.pp if layout.vp > 1 else 1  # Megatron's interleaved schedule
        step = self.micro_batch_size * layout.dp * at_once
        if self.global_batch_size % step:
            raise InputError(
                f"global_batch_size {self.global_batch_size} does not divide into micro-batches of "
                f"{self.micro_batch_size} on {layout.dp} data-parallel ranks{f', {at_once} at a time' * (at_once > 1)}"
                f"; the nearest legal size is {max(1, round(self.global_batch_size / step)) * step}"
            )

    def check_tokens(self, layout: Layout) -> None:
        """Raises InputError for micro-batches that student or teacher cannot multiply in FP8."""
        taught = [self.teacher_precision or self.precision] if self.learns_from_teacher else []
        check_tokens(self.sequence_length, self.micro_batch_size, layout, self.precision, *taught)

    def check_mixture(self, student: Architecture) -> None:
        """Raises InputError for a loss of routers where the student has none."""
        if self.moe_aux_loss_coeff and not student.num_moe_experts:
            raise InputError(
                f"moe_aux_loss_coeff is {self.moe_aux_loss_coeff:g} and the student is no mixture of experts; the "
                "nearest legal value is 0"
            )

    def check_states(self, student_layers: int, teacher_layers: int) -> None:
        """Raises InputError for intermediate states that are none of such models."""
        if self.intermediate not in ("", AUTO):
            layer_map(self.intermediate, student_layers, teacher_layers)

    def check_cache(self, vocab_size: int) -> None:
        """Raises InputError for a `teacher_cache` that is none, or has other rows, temperature or vocabulary."""
        if self.teacher_cache:
            from nemo_minitron.artifacts.logit_cache import CacheHeader

            CacheHeader.load(self.teacher_cache).check(
                self.teacher_cache, vocab_size=vocab_size, sequence_length=self.sequence_length,
                temperature=self.temperature,
            )  # fmt: skip

    def correction(self) -> Distillation:
        """The same settings for the teacher itself."""
        steps, tokens = self.warmup_steps, self.warmup_tokens
        if self.correction_warmup_steps:
            steps, tokens = self.correction_warmup_steps, 0
        return dataclasses.replace(
            self, tokens=self.correction_tokens, correction_tokens=0, learning_rate=self.correction_learning_rate,
            min_learning_rate=min(self.min_learning_rate, self.correction_learning_rate), logits_weight=0.0,
            lm_weight=1.0, intermediate="", start="pruned", validate_every=0, patience=0,
            warmup_steps=steps, warmup_tokens=tokens,
        )  # fmt: skip
