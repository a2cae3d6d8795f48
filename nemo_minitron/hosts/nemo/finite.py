"""A training ends at the step at which a number is none: on all ranks, before its weights are changed or saved."""

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
NORMS = ("get_grad_norm", "clip_grad_norm")  # what Megatron's optimizers call before they take a step: chained, single


class StopWhenNotFinite(Callback):
    """Raises DivergedError on every rank where a loss, the gradients' norm or a weight to be saved is NaN or infinite.

    The norm is Megatron's own, so that no gradient is read once more; weights are looked through when they are saved.
    What was saved last stays. Belongs before the callbacks that log and save.
    """

    def __init__(self) -> None:
        self._loss = 0.0
        self._first = 0
        self._good = ""  # the checkpoint that was saved last

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._first, self._good = trainer.global_step, str(trainer.ckpt_path or "")
        for optimizer in trainer.optimizers:
            inner = optimizer.mcore_optimizer
            for name in NORMS:
                if hasattr(inner, name):
                    setattr(inner, name, self._watched(trainer, getattr(inner, name)))

    def on_megatron_reduce_microbatches_end(
        self, step: Any, microbatch_outputs: Any, loss_reduction: Any, reduced: Any
    ) -> None:
        """The loss as it is logged; ranks of other pipeline stages have none."""
        self._loss = float(reduced) if not step.forward_only and torch.is_tensor(reduced) else 0.0

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and "val_loss" in trainer.callback_metrics:
            self._check(trainer, trainer.global_step, {"held-out loss": float(trainer.callback_metrics["val_loss"])})

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Before anything is written; by then NeMo's callback has the name of what it is about to write."""
        parameters = (p.detach() for chunk in chunks_of(trainer) for p in chunk.parameters() if p.numel())
        extremes = [float(extreme) for p in parameters for extreme in torch.aminmax(p)]
        self._check(trainer, trainer.global_step, {"weights' extreme": _worst(extremes)})
        self._good = getattr(trainer.checkpoint_callback, "last_model_path", "") or self._good

    def _watched(self, trainer: Any, norm: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(norm)
        def watched(*arguments: Any, **options: Any) -> Any:
            found = norm(*arguments, **options)
            numbers = {"loss": self._loss, "gradients' norm": float(found or 0.0)}
            self._check(trainer, trainer.global_step + 1, numbers)
            return found

        return watched

    def _check(self, trainer: Any, step: int, numbers: dict[str, float]) -> None:
        """Raises DivergedError on all ranks where one of them has a number that is none. Collective."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        kinds = torch.tensor([math.isinf(x) + 2 * math.isnan(x) for x in numbers.values()], device=device)
        torch.distributed.all_reduce(kinds, torch.distributed.ReduceOp.MAX)
        bad = [f"the {name} is {KINDS[kind]}" for name, kind in zip(numbers, kinds.tolist(), strict=True) if kind]
        if not bad:
            return
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        likely = EARLY if step <= self._first + 1 else LATER
        kept = f"the last good checkpoint stays: {self._good}" if self._good else "no checkpoint was saved before"
        raise DivergedError(
            f"training stopped at step {step}: {' and '.join(bad)}, at learning rate {rate:.3g}. Likely cause: "
            f"{likely}; {kept}"
        )


def _worst(numbers: list[float]) -> float:
    """One that is not finite, where there is one."""
    return next((x for x in numbers if not math.isfinite(x)), 0.0)
