"""Ends a training on all ranks when a number is not finite, before it reaches the weights or a checkpoint."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from nemo_minitron.errors import DivergedError
from nemo_minitron.hosts.nemo.trainer import chunks_of, leave_context

KINDS = ("finite", "infinite", "NaN")
EARLY = (
    "a model, a teacher or a precision whose numbers are not finite from the start; evaluate both models, or train in "
    "fp32"
)
LATER = "a learning rate that is too high for this model; give a lower one, or more steps of warm-up"
# Megatron's optimizers compute the gradients' norm by one of these before a step: chained ones by the first.
NORMS = ("get_grad_norm", "clip_grad_norm")


class StopWhenNotFinite(Callback):
    """Raises DivergedError on every rank if a loss, the gradients' norm or a weight is NaN or infinite on any rank.

    The norm is the one that Megatron computes anyway, so no gradient is read twice. The weights are checked when they
    are saved. The last checkpoint stays. This callback must stand before those that log and save.
    """

    def __init__(self) -> None:
        self._loss = 0.0
        self._first = 0
        self._last_good = ""  # the checkpoint that was saved last

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._first, self._last_good = trainer.global_step, str(trainer.ckpt_path or "")
        for optimizer in trainer.optimizers:
            inner = optimizer.mcore_optimizer
            for name in NORMS:
                if hasattr(inner, name):
                    setattr(inner, name, self._watched(trainer, getattr(inner, name)))

    def on_megatron_reduce_microbatches_end(
        self, step: Any, microbatch_outputs: Any, loss_reduction: Any, reduced: Any
    ) -> None:
        """Keeps the loss that is logged. Only the last pipeline stage has one."""
        self._loss = float(reduced) if not step.forward_only and torch.is_tensor(reduced) else 0.0

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and "val_loss" in trainer.callback_metrics:
            self._check(trainer, trainer.global_step, {"held-out loss": float(trainer.callback_metrics["val_loss"])})

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Checks the weights before anything is written. NeMo's callback already knows the name of the checkpoint."""
        parameters = (p.detach() for chunk in chunks_of(trainer) for p in chunk.parameters() if p.numel())
        extremes = [float(extreme) for p in parameters for extreme in torch.aminmax(p)]
        self._check(trainer, trainer.global_step, {"weights' extreme": _worst(extremes)})
        self._last_good = getattr(trainer.checkpoint_callback, "last_model_path", "") or self._last_good

    def _watched(self, trainer: Any, norm: Callable[..., Any]) -> Callable[..., Any]:
        """An optimizer's function of the gradients' norm that also checks the norm and the loss."""

        @functools.wraps(norm)
        def watched(*arguments: Any, **options: Any) -> Any:
            value = norm(*arguments, **options)
            numbers = {"loss": self._loss, "gradients' norm": float(value or 0.0)}
            self._check(trainer, trainer.global_step + 1, numbers)
            return value

        return watched

    def _check(self, trainer: Any, step: int, numbers: dict[str, float]) -> None:
        """Raises DivergedError on all ranks if any rank has a number that is not finite. Collective.

        `numbers`: name -> this rank's number. All ranks give the same names.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        kinds = torch.tensor([math.isinf(x) + 2 * math.isnan(x) for x in numbers.values()], device=device)
        torch.distributed.all_reduce(kinds, torch.distributed.ReduceOp.MAX)
        bad = [f"the {name} is {KINDS[kind]}" for name, kind in zip(numbers, kinds.tolist(), strict=True) if kind]
        if not bad:
            return
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        likely = EARLY if step <= self._first + 1 else LATER
        kept = "no checkpoint was saved before"
        if self._last_good:
            kept = f"the last good checkpoint stays: {self._last_good}"
        raise DivergedError(
            f"training stopped at step {step}: {' and '.join(bad)}, at learning rate {rate:.3g}. Likely cause: "
            f"{likely}; {kept}"
        )


def _worst(numbers: list[float]) -> float:
    """The first number that is not finite; 0 if all of them are."""
    return next((x for x in numbers if not math.isfinite(x)), 0.0)
