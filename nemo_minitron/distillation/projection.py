"""The learned linear layer from the student's width to the teacher's. All pairs of states share it.

Shapes (docs/shapes.md): S positions of the sequence, B sequences, H the student's hidden size, U the teacher's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor


class Projection:
    """`weight` [U, H], fp32, is the same on every rank and no part of the student.

    Outputs of norms are whole on every tensor-parallel rank; under sequence parallelism each rank has some of the
    tokens. In both cases the weight need not be sharded: only its gradient is summed. The optimizer is Adam without
    weight decay, at the student's learning rate. `kept`: for each of the student's channels the teacher's channel that
    it comes from, if a plan says so. Then the layer starts by putting each channel in its place, otherwise at random.
    """

    def __init__(self, student: int, teacher: int, seed: int, kept: Sequence[int] | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        start_UH = torch.empty(teacher, student).normal_(0, student**-0.5, generator=generator)
        if kept is not None:
            start_UH = torch.zeros(teacher, student)
            start_UH[list(kept), range(student)] = 1.0
        self.weight = start_UH.to(torch.cuda.current_device()).requires_grad_()
        self._adam = torch.optim.Adam([self.weight], betas=(0.9, 0.95))

    def __call__(self, state_SBH: Tensor) -> Tensor:
        return F.linear(state_SBH, self.weight.to(state_SBH.dtype))

    def step(self, learning_rate: float, tokens: float, sharded: bool) -> None:
        """The optimizer's step after a global step of so many tokens that count. Collective over the whole job.

        `sharded` as in `Meter.add`. Every pipeline stage calls it, also one without a pair of states.
        """
        gradient_UH = torch.zeros_like(self.weight) if self.weight.grad is None else self.weight.grad
        groups = [
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_pipeline_model_parallel_group(),
        ]
        for group in groups + [parallel_state.get_tensor_model_parallel_group()] * sharded:
            torch.distributed.all_reduce(gradient_UH, group=group)
        self.weight.grad = gradient_UH / tokens
        self._adam.param_groups[0]["lr"] = learning_rate
        self._adam.step()
        self.weight.grad = None

    def state(self) -> dict[str, object]:
        """The weight and its optimizer, for a checkpoint."""
        return {"weight": self.weight.detach().clone(), "adam": self._adam.state_dict()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        self.weight.copy_(state["weight"])
        self._adam.load_state_dict(state["adam"])
