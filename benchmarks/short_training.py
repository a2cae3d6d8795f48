"""A training step on Megatron's schedule, and a loop without a trainer, for many short runs in one process."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

Step = Callable[[Any, Any], Any]  # (model, batch) -> loss of each token [B, S], like NeMo's forward step


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
    places = torch.arange(tokens.shape[1], device=row.device)[None]
    mask = torch.ones(places.shape, device=row.device)
    return {"tokens": tokens, "labels": labels, "position_ids": places, "loss_mask": mask}


def in_ddp(
    model: Any, precision: str, peak: float = 1e-5, least: float = 0.0, distributed: bool = True
) -> tuple[Any, Any]:
    """A model in Megatron's DDP, and its optimizer, as NeMo's strategy and this project's recipes have them.

    Losses are summed and divided by the number of tokens, as in any distillation of this package. Without
    `distributed`, the optimizer is not shared out: one process on a CPU is spared three copies of the whole model a
    step, and the numbers are the same.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
    model.config.calculate_per_token_loss = True
    model.config.finalize_model_grads_func = finalize_model_grads
    wrapped = DistributedDataParallel(model.config, ddp, model.train())
    config = OptimizerConfig(
        optimizer="adam", lr=peak, min_lr=least, bf16=precision == "bf16", weight_decay=0.1, adam_beta1=0.9,
        adam_beta2=0.95, clip_grad=1.0, use_distributed_optimizer=distributed,
    )  # fmt: skip
    return wrapped, get_megatron_optimizer(config, [wrapped])


def train_step(
    forward: Step, model: Any, optimizer: Any, batch: dict[str, Any], data_step: Callable[[Any], Any] = next
) -> Any:
    """One step on one micro-batch: forward, backward, the gradient's norm and the optimizer.

    Returns the mean loss over the batch's tokens, a tensor: the caller decides when to wait for it.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model.zero_grad_buffer()
    optimizer.zero_grad()
    losses = get_forward_backward_func()(
        forward_step_func=lambda batches, chunk: (forward(chunk, data_step(batches)), _summed),
        data_iterator=iter([batch]), model=model, num_microbatches=1, seq_length=batch["tokens"].shape[1],
        micro_batch_size=1, forward_only=False,
    )  # fmt: skip
    optimizer.step()
    return losses[0]


def _summed(losses: Any) -> tuple[Any, Any, Any]:
    """The form that Megatron's schedule needs for a loss of each token: the sum, the number of tokens, the mean."""
    import torch

    return losses.sum(), torch.tensor(losses.numel(), dtype=torch.int, device=losses.device), losses.detach().mean()


class Training:
    """`model`, one Megatron chunk, trained on one row a step; the loss is the mean over its tokens."""

    def __init__(self, model: Any, steps: int, schedule: Schedule, precision: str = "bf16") -> None:
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        plain = precision == "fp32" and not next(model.parameters()).is_cuda
        self.model, self.optimizer = in_ddp(model, precision, schedule.peak, schedule.least, distributed=not plain)
        for group in self.optimizer.param_groups if plain else ():
            group["fused"] = True  # torch's AdamW in one pass over the memory, not in twenty
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
            self.schedule.step(1)
            losses.append(float(train_step(step, self.model, self.optimizer, batch)))
            after(self.learning_rate)
            seconds.append(time.process_time() - start)
        return {"losses": [round(x, 4) for x in losses], "CPU s a step": round(statistics.median(seconds), 3)}


def held_out_loss(model: Any, rows: Sequence[Any], vocab_size: int) -> float:
    """Mean cross entropy in nats of a Megatron chunk on rows of int64 [S + 1]."""
    import torch

    from nemo_minitron.distillation.step import Objective, distillation_step
    from nemo_minitron.hosts.nemo.distill import model_inputs

    step, training = distillation_step(Objective(vocab_size), model_inputs), model.training
    model.eval()
    with torch.inference_mode():
        losses = [step(model, batch_of(row)).double().mean().item() for row in rows]
    model.train(training)
    return statistics.fmean(losses)
