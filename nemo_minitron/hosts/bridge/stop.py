"""Stops a training before its last step, to be resumed later. The schedule and the data stay those of all steps."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch

from nemo_minitron.megatron.progress import say
from nemo_minitron.megatron.shutdown import ASKED


class Stop:
    """What Bridge's loop asks after each step: whether to save a checkpoint and to end. It takes the place of Bridge's
    own handler of signals, which sees SIGTERM alone.

    The training ends after step `after` (0: after the last one), if `wanted` is set on any rank, or if any rank was
    asked to: by SIGTERM, which Slurm sends to all processes of a job, or by its launcher. All ranks ask together.
    """

    def __init__(self, state: Any, after: int | None) -> None:
        self._state, self._after = state, after
        self.wanted = False
        self.asked = self.ended = False  # whether a signal, or anything of the above, has ended the training
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda number, frame: ASKED.set())

    def signals_received(self) -> list[bool]:
        """Whether the training ends after this step. Collective."""
        step, last = self._state.train_state.step, self._state.cfg.train.train_iters
        device = "cuda" if torch.cuda.is_available() else "cpu"
        any_rank = torch.tensor([ASKED.is_set(), self.wanted], dtype=torch.int, device=device)
        torch.distributed.all_reduce(any_rank, torch.distributed.ReduceOp.MAX)
        asked, wanted = map(bool, any_rank.tolist())
        if step >= last:
            return [False]
        self.asked = asked
        if asked and torch.distributed.get_rank() == 0:
            say(f"step {step}: told to stop, saved")
        self.ended = asked or wanted or step == self._after
        return [self.ended]
