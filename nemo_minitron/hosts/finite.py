"""Ends a training on all ranks when a number is not finite, before it reaches the weights or a checkpoint."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from nemo_minitron.errors import DivergedError

if TYPE_CHECKING:
    from torch import nn

KINDS = ("finite", "infinite", "NaN")
EARLY = (
    "a model, a teacher or a precision whose numbers are not finite from the start; evaluate both models, or train in "
    "fp32"
)
LATER = "a learning rate that is too high for this model; give a lower one, or more steps of warm-up"
# Megatron's optimizers compute the gradients' norm by one of these before a step: chained ones by the first.
NORMS = ("get_grad_norm", "clip_grad_norm")


class Guard:
    """Raises DivergedError on every rank if a loss, the gradients' norm or a weight is NaN or infinite on any rank.

    The norm is the one that Megatron computes anyway, so no gradient is read twice. `first`: the steps that were done
    when the training began; `last_good`: the last checkpoint, if there is one.
    """

    def __init__(self, first: int, last_good: str) -> None:
        self.first, self.last_good = first, last_good
        self.loss = 0.0  # of this step; the host sets it before the optimizer steps

    def watch(self, optimizer: Any, step: Callable[[], int]) -> None:
        """Checks the loss and the norm whenever Megatron's optimizer computes the norm. `step()`: of the present step,
        counted from 1."""
        for name in NORMS:
            if hasattr(optimizer, name):
                setattr(optimizer, name, self._watched(optimizer, step, getattr(optimizer, name)))

    def _watched(self, optimizer: Any, step: Callable[[], int], norm: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(norm)
        def watched(*arguments: Any, **options: Any) -> Any:
            value = norm(*arguments, **options)
            self.check(optimizer, step(), {"loss": self.loss, "gradients' norm": float(value or 0.0)})
            return value

        return watched

    def check_weights(self, optimizer: Any, step: int, chunks: Iterable[nn.Module]) -> None:
        """Checks the weights before anything of them is saved. Collective."""
        parameters = (p.detach() for chunk in chunks for p in chunk.parameters() if p.numel())
        extremes = [float(extreme) for p in parameters for extreme in torch.aminmax(p)]
        self.check(optimizer, step, {"weights' extreme": _worst(extremes)})

    def check(self, optimizer: Any, step: int, numbers: dict[str, float]) -> None:
        """Raises DivergedError on all ranks if any rank has a number that is not finite. Collective.

        `numbers`: name -> this rank's number. All ranks give the same names. `step`: counted from 1.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        kinds = torch.tensor([math.isinf(x) + 2 * math.isnan(x) for x in numbers.values()], device=device)
        torch.distributed.all_reduce(kinds, torch.distributed.ReduceOp.MAX)
        bad = [f"the {name} is {KINDS[kind]}" for name, kind in zip(numbers, kinds.tolist(), strict=True) if kind]
        if not bad:
            return
        rate = optimizer.param_groups[0]["lr"]
        likely = EARLY if step <= self.first + 1 else LATER
        kept = "no checkpoint was saved before"
        if self.last_good:
            kept = f"the last good checkpoint stays: {self.last_good}"
        raise DivergedError(
            f"training stopped at step {step}: {' and '.join(bad)}, at learning rate {rate:.3g}. Likely cause: "
            f"{likely}; {kept}"
        )


def _worst(numbers: list[float]) -> float:
    """The first number that is not finite; 0 if all of them are."""
    return next((x for x in numbers if not math.isfinite(x)), 0.0)
