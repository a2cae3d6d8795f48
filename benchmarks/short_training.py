"""Megatron's training loop without a trainer, for many short runs in one process: a step function, rows, losses."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from distillation_step import trained

Step = Callable[[Any, Any], Any]  # (model, batch) -> loss of each token [B, S], as NeMo's forward step


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Adam's learning rate rises over `warmup` steps to `peak` and falls to `least` as a cosine."""

    peak: float = 3e-4
    least: float = 3e-5
    warmup: int = 2
    weight_decay: float = 0.1


def batch_of(row: Any) -> dict[str, Any]:
    """int64 [S + 1] -> NeMo's batch of one row: `tokens`, `labels`, `position_ids`, `loss_mask`, [1, S] each."""
    import torch

    tokens, labels = row[None, :-1].contiguous(), row[None, 1:].contiguous()
    places = torch.arange(tokens.shape[1])[None]
    return {"tokens": tokens, "labels": labels, "position_ids": places, "loss_mask": torch.ones(places.shape)}


class Training:
    """`model`, one Megatron chunk, trained on one row a step; the loss is the mean over its tokens."""

    def __init__(self, model: Any, steps: int, schedule: Schedule, precision: str = "bf16") -> None:
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        model.config.calculate_per_token_loss = True
        self.model, self.optimizer = trained(model, precision, schedule.peak, schedule.least)
        decay = schedule.weight_decay
        self.schedule = OptimizerParamScheduler(
            self.optimizer, 0.0, schedule.peak, schedule.least, min(schedule.warmup, steps - 1), steps, "cosine",
            decay, decay, steps, "constant",
        )  # fmt: skip

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def run(
        self, step: Step, rows: Sequence[Any], *, before: Callable[[Any], None] = lambda batch: None,
        after: Callable[[float], None] = lambda learning_rate: None,
    ) -> dict[str, Any]:  # fmt: skip
        """`before` sees each batch, `after` the learning rate of each step. {"losses", "CPU s a step" (median)}."""
        losses, seconds = [], []
        for row in rows:
            batch, start = batch_of(row), time.process_time()
            before(batch)
            losses.append(self._step(step, batch))
            after(self.learning_rate)
            seconds.append(time.process_time() - start)
        return {"losses": [round(x, 4) for x in losses], "CPU s a step": round(statistics.median(seconds), 3)}

    def _step(self, step: Step, batch: dict[str, Any]) -> float:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.schedule.step(1)
        found = get_forward_backward_func()(
            forward_step_func=lambda batches, model: (step(model, next(batches)), _summed),
            data_iterator=iter([batch]), model=self.model, num_microbatches=1, seq_length=batch["tokens"].shape[1],
            micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        self.optimizer.step()
        return float(found[0])


def _summed(losses: Any) -> tuple[Any, Any, Any]:
    """What Megatron's schedule takes where the loss is one of each token: sum, tokens, what is kept."""
    import torch

    return losses.sum(), torch.tensor(losses.numel(), dtype=torch.int), losses.detach().mean()


def held_out_loss(model: Any, rows: Sequence[Any], vocab_size: int) -> float:
    """Mean cross entropy in nats of a Megatron chunk on rows of int64 [S + 1]."""
    import torch

    from nemo_minitron.distillation.step import Objective, distillation_step
    from nemo_minitron.hosts.nemo.distill import model_inputs

    step, training = distillation_step(Objective(vocab_size), model_inputs), model.training
    model.eval()
    with torch.inference_mode():
        found = [step(model, batch_of(row)).double().mean().item() for row in rows]
    model.train(training)
    return statistics.fmean(found)
