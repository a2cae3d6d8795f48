"""Distillation under NeMo's trainer: the frozen teacher beside the student, its logits as the target."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from nemo_minitron.artifacts.files import atomic_file
from nemo_minitron.distillation import losses
from nemo_minitron.distillation.step import distillation_step, masked_loss
from nemo_minitron.errors import InputError, nearest
from nemo_minitron.importance.estimate import architecture_of
from nemo_minitron.job.layout import Layout
from nemo_minitron.nemo.live import fill
from nemo_minitron.nemo.models import current_layout, load_model
from nemo_minitron.nemo.sources import open_source
from nemo_minitron.nemo.trainer import chunks_of, leave_context


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
        loss = masked_loss(self.loss, self.temperature, architecture_of(student[0]).vocab_size)
        # Set on the live config, after NeMo recorded its arguments: a checkpoint's context has NeMo's own.
        pl_module.config.forward_step_fn = distillation_step(teacher[0], loss)

    def _check(self, student: list[Any], layout: Layout) -> None:
        if layout.pp > 1:
            raise InputError(f"distillation runs on one pipeline stage so far, not pp={layout.pp}; use tp and dp")
        ours = architecture_of(student[0]).vocab_size
        theirs = open_source(self.teacher).architecture.vocab_size
        if ours != theirs:
            raise InputError(f"the student has {ours} tokens in its vocabulary, the teacher {theirs}; they must agree")


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
        self._start, self._first = time.perf_counter(), trainer.global_step
        rows = self.path.read_text().splitlines()[1:] if self.path.exists() else []
        kept = [row for row in rows if row.count(",") == 3 and int(row.split(",")[0]) <= trainer.global_step]
        self._before = float(kept[-1].rsplit(",", 1)[1]) if kept else 0.0
        if trainer.is_global_zero:
            with atomic_file(self.path) as file:
                file.write_text("\n".join([self.HEADER, *kept]) + "\n")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if not trainer.is_global_zero:
            return
        step, spent = trainer.global_step, time.perf_counter() - self._start
        with open(self.path, "a") as file:
            file.write(f"{step},{step * self.tokens},{float(loss):.6f},{self._before + spent:.2f}\n")
        if step % self.every == 0 or step == trainer.max_steps:
            rate = (step - self._first) * self.tokens / spent
            left = (trainer.max_steps - step) * self.tokens / rate
            line = f"step {step}/{trainer.max_steps}  loss {float(loss):.4f}  {rate:.0f} tokens/s  {left:.0f} s left"
            sys.stdout.write(f"  > {line}\n")  # one write, newline and all: other ranks print too
            sys.stdout.flush()
