"""The learned linear from the student's width to the teacher's, which all pairs of states share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor


class Projection:
    """`weight` [teacher's width, student's width], fp32, the same on every rank; it is no part of the student.

    Norms' outputs are whole on every tensor-parallel rank, or, under sequence parallelism, a part of the tokens:
    so the weight is never sharded, and only its gradient is summed. Adam without decay, at the student's
    learning rate. `kept`: the teacher's channel that each of the student's is, where a plan says so: the linear
    then starts by putting each in its place, and at random else.
    """

    def __init__(self, student: int, teacher: int, seed: int, kept: Sequence[int] | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        start = torch.empty(teacher, student).normal_(0, student**-0.5, generator=generator)
        if kept is not None:
            start = torch.zeros(teacher, student)
            start[list(kept), range(student)] = 1.0
        self.weight = start.to(torch.cuda.current_device()).requires_grad_()
        self._adam = torch.optim.Adam([self.weight], betas=(0.9, 0.95))

    def __call__(self, states: Tensor) -> Tensor:
        return F.linear(states, self.weight.to(states.dtype))

    def step(self, learning_rate: float, tokens: float, sharded: bool) -> None:
        """After a global step of so many tokens that count; `sharded` as in `Meter.add`. Collective."""
        gradient = torch.zeros_like(self.weight) if self.weight.grad is None else self.weight.grad
        groups = [
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_pipeline_model_parallel_group(),
        ]
        for group in groups + [parallel_state.get_tensor_model_parallel_group()] * sharded:
            torch.distributed.all_reduce(gradient, group=group)
        self.weight.grad = gradient / tokens
        self._adam.param_groups[0]["lr"] = learning_rate
        self._adam.step()
        self.weight.grad = None

    def state(self) -> dict[str, Any]:
        return {"weight": self.weight.detach().clone(), "adam": self._adam.state_dict()}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        self.weight.copy_(state["weight"])
        self._adam.load_state_dict(state["adam"])
