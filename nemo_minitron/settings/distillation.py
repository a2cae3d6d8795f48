"""How a student is retrained, as plain values: what it learns from, for how long, and what is checked on the way."""

from __future__ import annotations

import dataclasses

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.logit_cache import CacheHeader
from nemo_minitron.distillation.layer_map import AUTO, layer_map
from nemo_minitron.errors import InputError
from nemo_minitron.settings.fp8 import check_tokens
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.validated import ValidatedSettings


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

    tokens: int = 1_000_000
    sequence_length: int = 4096
    global_batch_size: int = 1
    micro_batch_size: int = 1
    learning_rate: float = 1e-4
    min_learning_rate: float = 1e-5
    warmup_steps: int = 40
    warmup_tokens: int = 0
    weight_decay: float = 0.1
    loss: str = "forward_kl"
    temperature: float = 1.0
    top_k: int = 100
    logits_weight: float = 1.0
    lm_weight: float = 0.0
    moe_aux_loss_coeff: float = 0.0
    intermediate: str = ""
    intermediate_loss: str = "cosine"
    intermediate_weight: float = 0.0
    start: str = "pruned"
    correction_tokens: int = 0
    correction_learning_rate: float = 2e-5
    correction_warmup_steps: int = 0
    precision: str = "bf16"
    teacher_precision: str = ""
    offload_teacher: bool = False
    teacher_cache: str = ""
    validate_every: int = 0
    validation_batches: int = 4
    patience: int = 0
    save_every: int = 100
    seed: int = 1234

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
