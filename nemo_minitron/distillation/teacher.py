"""The frozen teacher beside the student: model chunks of its own, run by Megatron's forward-only schedule."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from nemo_minitron.backend.engine import forget_copies

Inputs = Callable[[Any], dict[str, Any]]  # a micro-batch -> what GPTModel's forward takes, without labels


class Teacher:
    """This rank's chunks of the teacher, which no module of the student holds: no checkpoint, optimizer or
    gradient buffer sees them.

    With one pipeline stage it runs when the student's step asks for a micro-batch's logits. With several, all
    micro-batches of a global step go through its own stages first (`ahead`), divided as its own depth wants; the
    last stage keeps their last hidden states, and the student's point-to-point traffic stays as it was.
    `offload`: its layers lie on the CPU between global steps; its head stays.
    """

    def __init__(self, chunks: Sequence[Any], inputs: Inputs, *, offload: bool = False) -> None:
        for chunk in chunks:
            chunk.eval().requires_grad_(False)
        self.chunks, self.inputs, self.offload = list(chunks), inputs, offload
        last = self.chunks[-1]
        self._head = Head(last) if last.post_process else None
        last.post_process = False  # its forward pass ends at the last hidden state
        parameter = next(last.parameters())
        self.width: int = last.config.hidden_size
        self.options = {"dtype": parameter.dtype, "device": parameter.device}
        self.staged = parallel_state.get_pipeline_model_parallel_world_size() > 1
        self._kept: deque[Tensor] = deque()
        self.leave()

    @torch.no_grad()
    def ahead(
        self, batches: Any, data_step: Callable[[Any], Any], count: int, sequence_length: int, micro_batch_size: int
    ) -> None:
        """Runs `count` micro-batches through all stages; collective over the pipeline.

        `batches`: an iterator over them, or one for each virtual stage; `data_step` takes the next of one. The
        sequence length is global, as for Megatron's schedules.
        """
        self._kept.clear()  # of a step that failed
        self._kept += get_forward_backward_func()(
            forward_step_func=lambda batches, chunk: (chunk(**self.inputs(data_step(batches))), _whole),
            data_iterator=batches,
            model=self.chunks,
            num_microbatches=count,
            seq_length=sequence_length,
            micro_batch_size=micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )

    @torch.no_grad()
    def hidden(self, batch: Any) -> Tensor:
        """The last hidden state, after the final norm, [S(/tp under sequence parallelism), B, H], of the student's
        next micro-batch: its last chunk meets them in their order in all of Megatron's schedules."""
        return self._kept.popleft() if self.staged else self.chunks[-1](**self.inputs(batch))

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Last hidden state -> [B, S, V/tp], in the teacher's dtype."""
        return self.head(hidden)

    @property
    def head(self) -> Head:
        """The output layer, on the last stage alone."""
        assert self._head is not None
        return self._head

    def come(self) -> None:
        """Before a global step: all of it where it computes."""
        self._move(torch.cuda.current_device())

    def leave(self) -> None:
        """After a global step."""
        self._move("cpu")

    def _move(self, device: Any) -> None:
        for chunk in self.chunks if self.offload else ():
            for part in (chunk.embedding if chunk.pre_process else None, chunk.decoder):
                if part is not None and not (self._head and self._head.tied_to(part)):
                    forget_copies(part)
                    part.to(device)


def _whole(hidden: Tensor, non_loss_data: bool = True) -> Tensor:
    """What Megatron's schedule keeps of a micro-batch on the last stage."""
    return hidden


class Head:
    """The output layer of a chunk: last hidden state [S(/tp under sequence parallelism), B, H] -> [B, S, V/tp].

    `weight` [V/tp, H], its own or the tied embedding's.
    """

    def __init__(self, model: Any) -> None:
        self.layer = model.output_layer
        tied = model.share_embeddings_and_output_weights
        self.weight: Tensor = model.shared_embedding_or_output_weight() if tied else self.layer.weight

    def __call__(self, hidden: Tensor) -> Tensor:
        logits, _ = self.layer(hidden, weight=self.weight)
        return logits.transpose(0, 1)

    def tied_to(self, module: Any) -> bool:
        return any(parameter is self.weight for parameter in module.parameters())


@contextlib.contextmanager
def headless(chunk: Any) -> Iterator[Head]:
    """The chunk's forward pass ends at its last hidden state while this is open; gives the head that is left out."""
    head, chunk.post_process = Head(chunk), False
    try:
        yield head
    finally:
        chunk.post_process = True
