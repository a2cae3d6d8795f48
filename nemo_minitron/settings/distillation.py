"""How a student is distilled, as plain values: what it learns from, for how long, and how it is validated."""

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
    """Training a student on its teacher's outputs. `tokens` counts all steps together; `save_every` counts steps.

    `precision`: fp32, bf16, fp8-delayed, fp8-current, fp8-blockwise, or auto (bf16 if the machine is fast at it, else
    fp32). `teacher_precision`: that of the teacher; empty means the same. It cannot be fp8-delayed under Transformer
    Engine, whose delayed scales are updated in training only. `offload_teacher`: the teacher's layers stay in the CPU's
    memory between steps.

    The loss is `logits_weight` * `loss` (a name in `distillation.losses`) + `lm_weight` * the language-model loss. With
    logits_weight=0 only the language-model loss is left, which is the baseline. `intermediate`: "auto" or pairs of
    states (`distillation.layer_map`), compared by `intermediate_loss`; an `intermediate_weight` of 0 is the paper's
    dynamic alpha. `start`: pruned, or random, the baseline without the teacher's weights.

    `moe_aux_loss_coeff`, for a mixture of experts: the weight of the routers' load-balancing loss, summed over layers,
    as Megatron's setting of that name. The model's config (Mixtral's router_aux_loss_coef) does not set it: a student
    that learns from its teacher's logits learns its routing from them, so the default is 0.

    `teacher_cache`: a folder of `minitron cache-logits`. It takes the place of the teacher and of `loss`; the loss is
    then the cross-entropy against the cache's draws, or the KL on its largest logits, whichever it holds. `temperature`
    must be that of the cache.

    `correction_tokens`: teacher correction. The teacher first trains on this many tokens of the data, by the LM loss,
    and the corrected teacher is distilled. Its learning rate peaks at `correction_learning_rate` after
    `correction_warmup_steps`, or after the student's warm-up if those are 0. The student's learning rate rises over
    `warmup_tokens`, or over `warmup_steps` if those are 0, and falls as a cosine until the last token.

    Every `validate_every` steps the LM loss is measured on `validation_batches` global batches of held-out text. If it
    has not fallen for `patience` validations in a row, training ends. 0 switches either off.

    Raises InputError for a number out of range, an unknown name, and settings that contradict each other.
    """

    tokens: int = setting(1_000_000, "Tokens to train on, in all steps together.", most=TOKENS, panel=MODEL)
    sequence_length: int = setting(4096, "Length of a row, in tokens.", derived=True, panel=MODEL)
    global_batch_size: int = setting(1, "Rows of a step, over all ranks.", derived=True)
    micro_batch_size: int = setting(1, "Rows of a micro-batch, on each rank.")
    learning_rate: float = setting(1e-4, "Learning rate at its peak.", above_zero=True)
    min_learning_rate: float = setting(1e-5, "Learning rate at the last token; it falls as a cosine.", derived=True)
    warmup_steps: int = setting(40, "Steps until the learning rate reaches its peak.", least=0)
    warmup_tokens: int = setting(
        0, "Tokens until the learning rate reaches its peak; 0: use --warmup-steps.", least=0, most=TOKENS
    )
    weight_decay: float = setting(0.1, "Weight decay of the optimizer.")
    loss: str = setting("forward_kl", "Loss on logits: " + ", ".join(LOSSES) + ".", legal=LOSSES)
    temperature: float = setting(
        1.0, "Temperature of the loss on logits; a cache must have the same one.", above_zero=True
    )
    top_k: int = setting(100, "With --loss top_k_kl: the number of the teacher's tokens that are compared one by one.")
    logits_weight: float = setting(1.0, "Weight of the loss on logits; 0: the LM loss alone.")
    lm_weight: float = setting(0.0, "Weight of the language-model loss.")
    moe_aux_loss_coeff: float = setting(0.0, "Weight of the routers' load-balancing loss, for a mixture of experts.")
    intermediate: str = setting("", "States between layers that are compared: auto, or pairs such as block:13:29.")
    intermediate_loss: str = setting(
        "cosine", "Loss that compares these states: cosine or mse.", legal=("cosine", "mse")
    )
    intermediate_weight: float = setting(0.0, "Weight of --intermediate-loss; 0: the paper's dynamic weight.")
    start: str = setting("pruned", "Weights to start from: pruned, or random, a baseline.", legal=STARTS)
    correction_tokens: int = setting(
        0, "Tokens that the teacher itself first trains on (teacher correction); 0: none.", least=0, most=TOKENS
    )
    correction_learning_rate: float = setting(2e-5, "Peak learning rate of the teacher correction.", above_zero=True)
    correction_warmup_steps: int = setting(
        0, "Warm-up steps of the teacher correction; 0: as many as the student's.", least=0
    )
    precision: str = precision_setting("bf16")
    teacher_precision: str = setting("", "Precision of the teacher. Default: as --precision.", legal=("", *PRECISIONS))
    offload_teacher: bool = setting(False, "Keep the teacher's layers in the CPU's memory between steps.")
    teacher_cache: str = setting("", "Folder of minitron cache-logits, which takes the teacher's place.", panel=MODEL)
    validate_every: int = setting(0, "Steps between two validations; 0: none.", least=0)
    validation_batches: int = setting(4, "Global batches of held-out text in a validation.")
    patience: int = setting(
        0, "Validations in a row without a lower loss that end the training; 0: it never ends early.", least=0
    )
    save_every: int = setting(100, "Steps between checkpoints.", panel=OUTPUT)
    seed: int = seed_setting()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.logits_weight or self.lm_weight):
            raise InputError("logits_weight and lm_weight are both 0; at least one must be above 0")
        if self.patience and not self.validate_every:
            raise InputError(f"patience={self.patience} needs validate_every, the steps between two validations")
        for name in ("intermediate", "correction_tokens") if self.teacher_cache else ():
            if getattr(self, name):
                raise InputError(
                    f"{name} needs a teacher that runs, and teacher_cache takes its place; leave out one of them"
                )
        if self.teacher_cache and not self.logits_weight:
            raise InputError(
                "logits_weight is 0, so nothing would be learned from teacher_cache; leave out one of them"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.sequence_length * self.global_batch_size

    @property
    def steps(self) -> int:
        """Whole global batches in `tokens`, at least one."""
        return max(1, self.tokens // self.tokens_per_step)

    @property
    def warmup(self) -> int:
        """Steps until the learning rate reaches its peak."""
        return self.warmup_tokens // self.tokens_per_step if self.warmup_tokens else self.warmup_steps

    @property
    def learns_from_teacher(self) -> bool:
        """Whether a teacher runs beside the student."""
        return not self.teacher_cache and bool(self.logits_weight or self.intermediate)

    def check_batch(self, layout: Layout) -> None:
        """Raises InputError, with the nearest legal size, for a global batch that the layout cannot divide."""
        at_once = layout.pp if layout.vp > 1 else 1  # Megatron's interleaved schedule
        step = self.micro_batch_size * layout.dp * at_once
        if self.global_batch_size % step:
            raise InputError(
                f"global_batch_size {self.global_batch_size} does not divide into micro-batches of "
                f"{self.micro_batch_size} on {layout.dp} data-parallel ranks{f', {at_once} at a time' * (at_once > 1)}"
                f"; the nearest legal size is {max(1, round(self.global_batch_size / step)) * step}"
            )

    def check_tokens(self, layout: Layout) -> None:
        """Raises InputError for a micro-batch whose tokens the student or the teacher cannot multiply in FP8."""
        taught = [self.teacher_precision or self.precision] if self.learns_from_teacher else []
        check_tokens(self.sequence_length, self.micro_batch_size, layout, self.precision, *taught)

    def check_mixture(self, student: Architecture) -> None:
        """Raises InputError for a load-balancing loss if the student has no routers."""
        if self.moe_aux_loss_coeff and not student.num_moe_experts:
            raise InputError(
                f"moe_aux_loss_coeff is {self.moe_aux_loss_coeff:g}, but the student is no mixture of experts; the "
                "nearest legal value is 0"
            )

    def check_states(self, student_layers: int, teacher_layers: int) -> None:
        """Raises InputError for `intermediate` states that models of these depths do not have."""
        if self.intermediate not in ("", AUTO):
            layer_map(self.intermediate, student_layers, teacher_layers)

    def check_cache(self, vocab_size: int) -> None:
        """Raises InputError if `teacher_cache` is no cache, or has another row length, temperature or vocabulary."""
        if self.teacher_cache:
            from nemo_minitron.artifacts.logit_cache import CacheHeader

            CacheHeader.load(self.teacher_cache).check(
                self.teacher_cache, vocab_size=vocab_size, sequence_length=self.sequence_length,
                temperature=self.temperature,
            )  # fmt: skip

    def correction(self) -> Distillation:
        """The settings by which the teacher itself is trained first (teacher correction)."""
        steps, tokens = self.warmup_steps, self.warmup_tokens
        if self.correction_warmup_steps:
            steps, tokens = self.correction_warmup_steps, 0
        return dataclasses.replace(
            self, tokens=self.correction_tokens, correction_tokens=0, learning_rate=self.correction_learning_rate,
            min_learning_rate=min(self.min_learning_rate, self.correction_learning_rate), logits_weight=0.0,
            lm_weight=1.0, intermediate="", start="pruned", validate_every=0, patience=0,
            warmup_steps=steps, warmup_tokens=tokens,
        )  # fmt: skip
