"""A training ends at the step at which a number is none: on all ranks, before its weights are changed or saved."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from nemo_minitron.errors import DivergedError
from nemo_minitron.nemo.trainer import chunks_of, leave_context

NORMS = ("get_grad_norm", "clip_grad_norm")  # what Megatron's optimizers call before they take a step: chained, single


class StopWhenNotFinite(Callback):
    """Raises DivergedError on every rank where a loss, the gradients' norm or a weight to be saved is NaN or infinite.

    The norm is Megatron's own, so that no gradient is read once more; weights are looked through when they are saved.
    What was saved last stays. Belongs before the callbacks that log and save.
    """

    def __init__(self) -> None:
        self._loss = 0.0
        self._first = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._first = trainer.global_step
        for optimizer in trainer.optimizers:
            inner = optimizer.mcore_optimizer
            for name in NORMS:
                if hasattr(inner, name):
                    setattr(inner, name, self._watched(trainer, getattr(inner, name)))

    def on_megatron_reduce_microbatches_end(
        self, step: Any, microbatch_outputs: Any, loss_reduction: Any, reduced: Any
    ) -> None:
        """The loss as it is logged; 0 on ranks that have none."""
        value = reduced[0] if isinstance(reduced, (tuple, list)) else reduced
        self._loss = float(value) if not step.forward_only and torch.is_tensor(value) and value.numel() == 1 else 0.0

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        loss = trainer.callback_metrics.get("val_loss")
        if trainer.state.fn == "fit" and loss is not None and _anywhere(not math.isfinite(float(loss))):
            raise DivergedError(self._sentence(trainer, f"the held-out loss is {float(loss)}", trainer.global_step))

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        bad = next((name for name, parameter in _parameters(trainer) if not _finite(parameter)), None)
        if _anywhere(bad is not None):
            what = f"the weights '{bad}' are not finite" if bad else "weights of another rank are not finite"
            raise DivergedError(self._sentence(trainer, what, trainer.global_step))

    def _watched(self, trainer: Any, norm: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(norm)
        def watched(*arguments: Any, **options: Any) -> Any:
            found = norm(*arguments, **options)
            size, self._loss, loss = float(found or 0.0), 0.0, self._loss
            if _anywhere(not (math.isfinite(size) and math.isfinite(loss))):
                what = [f"the loss is {loss}"] * (not math.isfinite(loss)) + [f"the gradients' norm is {size}"]
                raise DivergedError(self._sentence(trainer, " and ".join(what), trainer.global_step + 1))
            return found

        return watched

    def _sentence(self, trainer: Any, what: str, step: int) -> str:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        start = step <= self._first + 1
        cause = (
            "the model, its teacher or its precision: what goes in is not finite already; evaluate both models, or "
            "train in fp32" if start else "a learning rate that is too high for this model: give a lower one, or more "
            "steps of warm-up"
        )  # fmt: skip
        saved = getattr(trainer.checkpoint_callback, "last_model_path", "") or trainer.ckpt_path
        kept = f"the last good checkpoint stays: {saved}" if saved else "no checkpoint was saved before"
        return f"training stopped at step {step}: {what}, at learning rate {rate:.3g}. Likely cause: {cause}; {kept}"


def _anywhere(bad: bool) -> bool:
    """Whether any rank says so. Collective."""
    found = torch.tensor(float(bad), device="cuda" if torch.cuda.is_available() else "cpu")
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found)


def _parameters(trainer: Any) -> Any:
    for chunk in chunks_of(trainer):
        yield from chunk.named_parameters()


@torch.no_grad()
def _finite(parameter: torch.Tensor) -> bool:
    """Without a second tensor of its size: NaN and infinities come through as an extreme."""
    values = parameter.detach()
    if not values.numel():
        return True
    return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(values))
