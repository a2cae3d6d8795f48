"""Losses between intermediate states, on any pipeline stage (2407.14679, section 3.3)."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from nemo_minitron.backend.collectives import gather_objects
from nemo_minitron.distillation.layer_map import Pair, Point
from nemo_minitron.distillation.meter import TOKENS, Meter
from nemo_minitron.distillation.projection import Projection
from nemo_minitron.distillation.taps import points, tap
from nemo_minitron.distillation.teacher import Teacher
from nemo_minitron.errors import InputError


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of states [..., H], per token, fp32."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the width of the squared difference of states [..., H], per token, fp32."""
    return (student.float() - teacher.float()).square().mean(-1)


MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": cosine, "mse": mse}


class Intermediate:
    """This rank's part of the losses of all `pairs`. Their gradient enters where the student's state arises, so
    that nothing more goes between the student's stages; the teacher's states are sent once, ahead of the step.

    `weight` multiplies their sum; None: it is alpha = L_logits / L_intermediate (both means over the tokens of the
    step before, a constant; 1 in the first step), since the logits' loss of a step is known only after earlier
    stages have begun their backward pass. `projection`: None where both models have one width.
    Raises InputError for a student that computes its layers again in the backward pass or trains in fp16.
    """

    def __init__(
        self, pairs: Sequence[Pair], student: Sequence[Any], teacher: Teacher, *, measure: str = "cosine",
        weight: float | None = None, projection: Projection | None = None, meter: Meter,
    ) -> None:  # fmt: skip
        _check(student[0].config)
        self.pairs, self.teacher, self.projection, self.meter = list(pairs), teacher, projection, meter
        self.measure, self.weight = MEASURES[measure], weight
        self.alpha = 1.0 if weight is None else weight
        self.sharded = student[0].config.sequence_parallel
        self._mask: Tensor | None = None
        self._targets: dict[Pair, deque[Tensor]] = defaultdict(deque)
        shown = [_stages(chunks) for chunks in (teacher.chunks, student)]
        self._routes = [(pair, shown[0][pair.kind, pair.teacher], shown[1][pair.kind, pair.student]) for pair in pairs]
        wanted = {(pair.kind, pair.teacher) for pair in pairs}, {(pair.kind, pair.student) for pair in pairs}
        self._hooks = [hook for chunk in teacher.chunks for hook in tap(chunk, wanted[0], self._see_teacher)]
        self._hooks += [hook for chunk in student for hook in tap(chunk, wanted[1], self._see_student)]

    def expect(self, batch: dict[str, Any]) -> None:
        """The whole micro-batch that comes next to one of this rank's chunks."""
        mask = get_batch_on_this_cp_rank({"loss_mask": batch["loss_mask"].to(torch.cuda.current_device())})
        mask = mask["loss_mask"].t().float()  # [S, B], as states are
        if self.sharded:
            size = parallel_state.get_tensor_model_parallel_world_size()
            mask = mask.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
        self._mask = mask

    def _see_teacher(self, point: Point, states: Tensor) -> None:
        for pair in self.pairs:
            if (pair.kind, pair.teacher) == point:
                self._targets[pair].append(states.to(self.teacher.options["dtype"]))

    def _see_student(self, point: Point, states: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():  # validation
            return None
        losses = [self._loss(pair, states) for pair in self.pairs if (pair.kind, pair.student) == point]
        return self.alpha * torch.stack(losses).sum()

    def _loss(self, pair: Pair, states: Tensor) -> Tensor:
        """The sum over this rank's tokens that count."""
        projected = states if self.projection is None else self.projection(states)
        losses = self.measure(projected, self._targets[pair].popleft())
        assert self._mask is not None
        total = (losses * self._mask).sum()
        self.meter.add(str(pair), total, sharded=self.sharded)
        return total

    def send(self, count: int, sequence_length: int, micro_batch_size: int) -> None:
        """After the teacher's schedule: its states of `count` micro-batches to the stages that want them."""
        group = parallel_state.get_pipeline_model_parallel_group()
        rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_process_group_ranks(group)
        length = sequence_length // parallel_state.get_context_parallel_world_size()
        length //= parallel_state.get_tensor_model_parallel_world_size() if self.sharded else 1
        shape = length, micro_batch_size, self.teacher.width
        operations = []
        for pair, source, target in self._routes:
            if source == target or rank not in (source, target):
                continue
            if rank == source:
                states = [self._targets[pair].popleft() for _ in range(count)]
                way, other = torch.distributed.isend, ranks[target]
            else:
                states = [torch.empty(shape, **self.teacher.options) for _ in range(count)]
                self._targets[pair].extend(states)
                way, other = torch.distributed.irecv, ranks[source]
            operations += [torch.distributed.P2POp(way, state, other, group) for state in states]
        for work in torch.distributed.batch_isend_irecv(operations) if operations else ():
            work.wait()

    def finish(self, parts: dict[str, float], learning_rate: float) -> None:
        """After a global step with these means (`Meter.reduce`): the projection's step and the next alpha."""
        if self.projection is not None:
            self.projection.step(learning_rate, parts[TOKENS], self.sharded)
        total = sum(parts[str(pair)] for pair in self.pairs)
        if self.weight is None and total > 0:
            self.alpha = parts.get("logits", parts.get("lm", 0.0)) / total

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def state(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "projection": self.projection.state() if self.projection else None}

    def load(self, state: dict[str, Any]) -> None:
        self.alpha = state["alpha"]
        if self.projection is not None:
            self.projection.load(state["projection"])


def _check(config: Any) -> None:
    if config.recompute_granularity == "full" or set(config.recompute_modules or ()) - {"core_attn"}:
        raise InputError(
            "the student computes its layers again for the backward pass; intermediate losses need "
            "recompute_granularity unset, or 'selective' with recompute_modules=['core_attn']"
        )
    if config.fp16:
        raise InputError("the student trains in fp16; intermediate losses need bf16 or fp32, whose loss is not scaled")


def _stages(chunks: Sequence[Any]) -> dict[Point, int]:
    """Which pipeline rank shows which state of a model. Collective."""
    group = parallel_state.get_pipeline_model_parallel_group()
    everywhere = gather_objects(set().union(*map(points, chunks)), group)
    return {point: rank for rank, shown in enumerate(everywhere) for point in shown}
