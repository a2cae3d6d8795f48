"""Distillation under NeMo's trainer: the frozen teacher beside the student, its logits as the target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from megatron.core import parallel_state
from torch import Tensor

from nemo_minitron.distillation import losses
from nemo_minitron.errors import InputError, nearest
from nemo_minitron.importance.collector import unwrap
from nemo_minitron.importance.estimate import architecture_of
from nemo_minitron.job.layout import Layout
from nemo_minitron.nemo.callbacks import chunks_of, leave_context
from nemo_minitron.nemo.live import fill
from nemo_minitron.nemo.models import current_layout, load_model
from nemo_minitron.nemo.sources import open_source


class FillStudent(Callback):
    """Fills the model of a fresh fit by reading `source`; a fit that resumes keeps its own weights."""

    def __init__(self, source: str) -> None:
        self.source = source

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.ckpt_path is None:
            fill(chunks_of(trainer), open_source(self.source))
            for optimizer in trainer.optimizers:
                optimizer.mcore_optimizer.reload_model_params()  # the fp32 master copies

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "validate":
            fill(chunks_of(trainer), open_source(self.source))


class Distillation(Callback):
    """On `trainer.fit`: the loss becomes one between teacher's and student's logits (2407.14679, section 3).

    `teacher`: a Hugging Face folder, a hub id or a NeMo checkpoint, loaded by reading in the student's
    layout: frozen, in eval mode, without gradients, optimizer state or gradient buffers, and outside the
    student's module tree, so that no checkpoint sees it. `precision` is the teacher's.
    Raises InputError for an unknown loss, another vocabulary or pipeline stages.
    """

    def __init__(
        self, teacher: str, loss: str = "forward_kl", temperature: float = 1.0, precision: str = "bf16"
    ) -> None:
        if loss not in losses.__all__:
            raise InputError(f"loss '{loss}' is unknown; {nearest(loss, losses.__all__)}")
        self.teacher, self.loss, self.temperature, self.precision = teacher, loss, temperature, precision

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        student = chunks_of(trainer)
        layout = current_layout(sp=student[0].config.sequence_parallel)
        self._check(student, layout)
        teacher = load_model(self.teacher, precision=self.precision, layout=layout)
        for chunk in teacher:
            chunk.eval().requires_grad_(False)
        step = distillation_step(teacher[0], self._loss(architecture_of(student[0]).vocab_size))
        # Set on the live config, after NeMo recorded its arguments: a checkpoint's context has NeMo's own.
        pl_module.config.forward_step_fn = step

    def _check(self, student: list[Any], layout: Layout) -> None:
        if layout.pp > 1:
            raise InputError(f"distillation runs on one pipeline stage so far, not pp={layout.pp}; use tp and dp")
        ours = architecture_of(student[0]).vocab_size
        theirs = open_source(self.teacher).architecture.vocab_size
        if ours != theirs:
            raise InputError(f"the student has {ours} tokens in its vocabulary, the teacher {theirs}; they must agree")

    def _loss(self, vocab_size: int) -> Callable[[Tensor, Tensor], Tensor]:
        loss, temperature = getattr(losses, self.loss), self.temperature

        def masked(student: Tensor, teacher: Tensor) -> Tensor:
            """[B, S, V/tp] shards -> [B, S]; columns that pad the vocabulary take no part."""
            group = parallel_state.get_tensor_model_parallel_group()
            true = _true_columns(vocab_size, student.shape[-1])
            return loss(student[..., :true], teacher[..., :true], temperature, group)

        return masked


def _true_columns(vocab_size: int, local: int) -> int:
    first = parallel_state.get_tensor_model_parallel_rank() * local
    return max(0, min(local, vocab_size - first))


def distillation_step(teacher: Any, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Tensor]:
    """NeMo's forward step with the loss against the teacher in the place of cross entropy.

    What it returns, [B, S] fp32 per token, goes through NeMo's own masked reduction, as a language-model
    loss does. In validation it is NeMo's cross entropy as before.
    """

    def step(model: Any, batch: dict[str, Any]) -> Tensor:
        inputs = {"input_ids": batch["tokens"], "position_ids": batch["position_ids"]}
        mask = batch.get("attention_mask")
        if not unwrap(model).training:
            return model(**inputs, attention_mask=mask, labels=batch["labels"])
        with torch.no_grad():
            target = teacher(**inputs, attention_mask=mask)
        return loss(model(**inputs, attention_mask=mask), target)

    return step


class LossLog(Callback):
    """`loss.csv` (step, tokens, loss, seconds) and a line of progress; rank 0 writes.

    Rows of steps that are done again after a resume are replaced; seconds go on from the last kept row.
    """

    HEADER = "step,tokens,loss,seconds"

    def __init__(self, path: str, tokens_per_step: int, every: int = 10) -> None:
        self.path, self.tokens, self.every = Path(path), tokens_per_step, every
        self._before = self._start = 0.0
        self._first = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        import time

        self._start, self._first = time.perf_counter(), trainer.global_step
        rows = self.path.read_text().splitlines()[1:] if self.path.exists() else []
        kept = [row for row in rows if row.count(",") == 3 and int(row.split(",")[0]) <= trainer.global_step]
        self._before = float(kept[-1].rsplit(",", 1)[1]) if kept else 0.0
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("\n".join([self.HEADER, *kept]) + "\n")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
        import time

        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if not trainer.is_global_zero:
            return
        step, spent = trainer.global_step, time.perf_counter() - self._start
        with open(self.path, "a") as file:
            file.write(f"{step},{step * self.tokens},{float(loss):.6f},{self._before + spent:.2f}\n")
        if step % self.every == 0 or step == trainer.max_steps:
            rate = (step - self._first) * self.tokens / spent
            left = (trainer.max_steps - step) * self.tokens / rate
            print(
                f"  > step {step}/{trainer.max_steps}  loss {float(loss):.4f}  {rate:.0f} tokens/s  "
                f"{left:.0f} s left",
                flush=True,
            )
