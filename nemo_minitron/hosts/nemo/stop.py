"""Stops a training before its last step, to be resumed later. The schedule and the data stay those of all steps."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from nemo_minitron.hosts.nemo.trainer import leave_context
from nemo_minitron.megatron.progress import say
from nemo_minitron.megatron.shutdown import ASKED, SAVED


class StopAfter(Callback):
    """Ends `trainer.fit` after step `step`. It saves nothing itself."""

    def __init__(self, step: int) -> None:
        self.step = step

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.step


class SaveWhenAsked(Callback):
    """Saves a checkpoint and ends the process with exit code 143, after the step in which any rank was asked to. A rank
    is asked by SIGTERM, which Slurm sends to all processes of a job, or by its launcher. A later `fit` resumes from the
    checkpoint."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda number, frame: ASKED.set())

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        # Any rank may have been asked, and all of them must save together.
        any_asked = torch.tensor(float(ASKED.is_set()), device="cuda" if torch.cuda.is_available() else "cpu")
        torch.distributed.all_reduce(any_asked, torch.distributed.ReduceOp.MAX)
        if not any_asked or trainer.global_step >= trainer.max_steps:
            return
        checkpoints = trainer.checkpoint_callback
        # NeMo's PreemptionCallback saves in this way too, but only rank 0 can start it.
        checkpoints._save_last_checkpoint(trainer, checkpoints._monitor_candidates(trainer))
        torch.distributed.barrier()  # torchrun ends the other ranks as soon as one has left
        if trainer.is_global_zero:
            say(f"step {trainer.global_step}: told to stop, saved")
        raise SystemExit(SAVED)
