"""Losses between intermediate states, on any pipeline stage (2407.14679, section 3.3).

Shapes (docs/shapes.md): S positions of the sequence, B sequences, H hidden size, U the teacher's hidden size.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from nemo_minitron.backend.collectives import gather_objects
from nemo_minitron.backend.differences import batch_on_this_cp_rank
from nemo_minitron.distillation.layer_map import Pair, Point
from nemo_minitron.distillation.meter import TOKENS, Meter
from nemo_minitron.distillation.projection import Projection
from nemo_minitron.distillation.taps import points, tap
from nemo_minitron.distillation.teacher import Teacher
from nemo_minitron.errors import InputError

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule


def cosine(student_SBU: Tensor, teacher_SBU: Tensor) -> Tensor:
    """fp32 [S, B]: 1 - cosine of the two states of each token."""
    return 1 - F.cosine_similarity(student_SBU.float(), teacher_SBU.float(), dim=-1)


def mse(student_SBU: Tensor, teacher_SBU: Tensor) -> Tensor:
    """fp32 [S, B]: the mean over the width of the squared difference of the two states of each token."""
    return (student_SBU.float() - teacher_SBU.float()).square().mean(-1)


MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": cosine, "mse": mse}


class Intermediate:
    """This rank's part of the losses of all `pairs`, on the hooks of both models.

    The gradient of a loss enters on the pipeline stage where the student computes the state, so the student's stages
    exchange nothing more than before. The teacher's states are sent once, ahead of the step.

    `weight` multiplies the sum of the losses. None: the weight is the paper's alpha = L_logits / L_intermediate, a
    constant. Both are means over the tokens of the step before, and alpha is 1 in the first step: the logits' loss of a
    step is known too late, when earlier stages have begun their backward pass. `projection`: None if both models have
    one width. Raises InputError for a student that recomputes its layers in the backward pass or trains in fp16, and
    for a state that a layer does not have.
    """

    def __init__(
        self, pairs: Sequence[Pair], student: Sequence[MegatronModule], teacher: Teacher, *, measure: str = "cosine",
        weight: float | None = None, projection: Projection | None = None, meter: Meter,
    ) -> None:  # fmt: skip
        _check(student[0].config)
        self.pairs, self.teacher, self.projection, self.meter = list(pairs), teacher, projection, meter
        self.measure, self.weight = MEASURES[measure], weight
        self.alpha = 1.0 if weight is None else weight
        self.sharded = student[0].config.sequence_parallel
        self._mask_SB: Tensor | None = None
        self._targets: dict[Pair, deque[Tensor]] = defaultdict(deque)
        of_teacher, of_student = _stages(teacher.chunks), _stages(student)
        _check_points(self.pairs, of_student, of_teacher)
        # Each pair with the pipeline rank that computes the teacher's state, and the one that computes the student's.
        self._routes = [
            (pair, of_teacher[pair.kind, pair.teacher], of_student[pair.kind, pair.student]) for pair in pairs
        ]
        teachers, students = {(p.kind, p.teacher) for p in pairs}, {(p.kind, p.student) for p in pairs}
        self._hooks = [hook for chunk in teacher.chunks for hook in tap(chunk, teachers, self._see_teacher)]
        self._hooks += [hook for chunk in student for hook in tap(chunk, students, self._see_student)]

    def expect(self, batch: dict[str, Tensor]) -> None:
        """Takes the micro-batch that one of this rank's chunks gets next, before it is cut for context parallelism."""
        cut = batch_on_this_cp_rank({"loss_mask": batch["loss_mask"].to(torch.cuda.current_device())})
        mask_SB = cut["loss_mask"].t().float()  # positions first, as states have them
        if self.sharded:
            size = parallel_state.get_tensor_model_parallel_world_size()
            mask_SB = mask_SB.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
        self._mask_SB = mask_SB

    def _see_teacher(self, point: Point, state_SBU: Tensor) -> None:
        for pair in self.pairs:
            if (pair.kind, pair.teacher) == point:
                self._targets[pair].append(state_SBU.to(self.teacher.options["dtype"]))

    def _see_student(self, point: Point, state_SBH: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():  # validation
            return None
        losses = [self._loss(pair, state_SBH) for pair in self.pairs if (pair.kind, pair.student) == point]
        return self.alpha * torch.stack(losses).sum()

    def _loss(self, pair: Pair, state_SBH: Tensor) -> Tensor:
        """The sum over this rank's tokens that count."""
        projected_SBU = state_SBH if self.projection is None else self.projection(state_SBH)
        loss_SB = self.measure(projected_SBU, self._targets[pair].popleft())
        assert self._mask_SB is not None
        total = (loss_SB * self._mask_SB).sum()
        self.meter.add(str(pair), total, sharded=self.sharded)
        return total

    def send(self, count: int, sequence_length: int, micro_batch_size: int) -> None:
        """Sends the teacher's states of `count` micro-batches to the stages that compare them. After its schedule."""
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
                operation, other = torch.distributed.isend, ranks[target]
            else:
                states = [torch.empty(shape, **self.teacher.options) for _ in range(count)]
                self._targets[pair].extend(states)
                operation, other = torch.distributed.irecv, ranks[source]
            operations += [torch.distributed.P2POp(operation, state, other, group) for state in states]
        for work in torch.distributed.batch_isend_irecv(operations) if operations else ():
            work.wait()

    def finish(self, parts: dict[str, float], learning_rate: float) -> None:
        """Ends a global step, whose means are `parts` (`Meter.reduce`): the projection's step and the next alpha."""
        if self.projection is not None:
            self.projection.step(learning_rate, parts[TOKENS], self.sharded)
        total = sum(parts[str(pair)] for pair in self.pairs)
        if self.weight is None and total > 0:
            self.alpha = parts.get("logits", parts.get("lm", 0.0)) / total

    def remove(self) -> None:
        """Takes the hooks off both models."""
        for hook in self._hooks:
            hook.remove()

    def state(self) -> dict[str, object]:
        """What a checkpoint needs to go on: alpha, the projection and its optimizer."""
        return {"alpha": self.alpha, "projection": self.projection.state() if self.projection else None}

    def load(self, state: Mapping[str, Any]) -> None:
        self.alpha = state["alpha"]
        if self.projection is not None:
            self.projection.load(state["projection"])


def _check(config: TransformerConfig) -> None:
    if config.recompute_granularity == "full" or set(config.recompute_modules or ()) - {"core_attn"}:
        raise InputError(
            "the student computes its layers again for the backward pass; intermediate losses need "
            "recompute_granularity unset, or 'selective' with recompute_modules=['core_attn']"
        )
    if config.fp16:
        raise InputError("the student trains in fp16; intermediate losses need bf16 or fp32, whose loss is not scaled")


def _check_points(pairs: Sequence[Pair], of_student: Mapping[Point, int], of_teacher: Mapping[Point, int]) -> None:
    for pair in pairs:
        for whose, layer, states in (("student", pair.student, of_student), ("teacher", pair.teacher, of_teacher)):
            if (pair.kind, layer) not in states:
                kinds = sorted({kind for kind, of_layer in states if of_layer == layer})
                raise InputError(
                    f"'{pair}' names a state that layer {layer} of the {whose}, a hybrid, does not have; it has "
                    f"{', '.join(kinds)}"
                )


def _stages(chunks: Sequence[MegatronModule]) -> dict[Point, int]:
    """State of a model -> the pipeline rank that computes it. Collective over the pipeline."""
    group = parallel_state.get_pipeline_model_parallel_group()
    points_of_ranks = gather_objects(set().union(*map(points, chunks)), group)
    return {point: rank for rank, on_rank in enumerate(points_of_ranks) for point in on_rank}
