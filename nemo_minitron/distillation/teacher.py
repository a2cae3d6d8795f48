"""The frozen teacher beside the student: model chunks of its own, run by Megatron's forward-only schedule.

Shapes (docs/shapes.md): S positions of the sequence (S / tp under sequence parallelism), B sequences, U the teacher's
hidden size, W columns of the vocabulary on this rank.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Union

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor, nn

from nemo_minitron.backend.differences import scaled_logits
from nemo_minitron.backend.engine import forget_copies

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

Batch = dict[str, Tensor]  # a micro-batch of the host; with a cache of logits, also a function that reads the targets
DataStep = Callable[[Iterator[Batch]], Batch]  # takes the next micro-batch and cuts it for this rank
Batches = Union[Iterator[Batch], list[Iterator[Batch]]]  # one iterator, or one for each virtual stage
Inputs = Callable[[Batch], dict[str, object]]  # a micro-batch -> arguments of GPTModel's forward, without labels


class Teacher:
    """This rank's chunks of the teacher. No module of the student holds them, so no checkpoint, optimizer or gradient
    buffer has them.

    With one pipeline stage the teacher runs when the student's step asks for a micro-batch's logits. With several
    stages all micro-batches of a global step go through the teacher's stages first (`ahead`). Its layers are divided
    over the stages by their own number, and its last stage keeps the last hidden states. So the traffic between the
    student's stages stays as it was. `offload`: the layers lie on the CPU between global steps; the head stays.
    """

    def __init__(self, chunks: Sequence[MegatronModule], inputs: Inputs, *, offload: bool = False) -> None:
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
        self, batches: Batches, data_step: DataStep, count: int, sequence_length: int, micro_batch_size: int
    ) -> None:
        """Runs `count` micro-batches through all stages. Collective over the pipeline.

        `batches`: an iterator over them, or one for each virtual stage. `data_step` takes the next one from an
        iterator. The sequence length is global, as in Megatron's schedules.
        """
        self._kept.clear()  # of a step that failed
        self._kept += get_forward_backward_func()(
            forward_step_func=lambda batches, chunk: (chunk(**self.inputs(data_step(batches))), _keep),
            data_iterator=batches,
            model=self.chunks,
            num_microbatches=count,
            seq_length=sequence_length,
            micro_batch_size=micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """[S, B, U]: the last hidden state, after the final norm, of the student's next micro-batch.

        In all of Megatron's schedules the student's last chunk gets the micro-batches in their order.
        """
        return self._kept.popleft() if self.staged else self.chunks[-1](**self.inputs(batch))

    @torch.no_grad()
    def logits(self, hidden_SBU: Tensor) -> Tensor:
        """Last hidden state -> logits [B, S, W], in the teacher's dtype."""
        return self.head(hidden_SBU)

    @property
    def head(self) -> Head:
        """The output layer. Only the last stage has it."""
        assert self._head is not None
        return self._head

    def come(self) -> None:
        """Before a global step: moves the layers to the device that computes."""
        self._move(torch.cuda.current_device())

    def leave(self) -> None:
        """After a global step: moves the layers to the CPU, if they are offloaded."""
        self._move("cpu")

    def _move(self, device: int | str) -> None:
        for chunk in self.chunks if self.offload else ():
            for part in (chunk.embedding if chunk.pre_process else None, chunk.decoder):
                if part is not None and not (self._head and self._head.tied_to(part)):
                    forget_copies(part)
                    part.to(device)


def _keep(hidden_SBU: Tensor, non_loss_data: bool = True) -> Tensor:
    """Tells Megatron's schedule to keep the last stage's output of a micro-batch."""
    return hidden_SBU


class Head:
    """The output layer of a chunk: last hidden state [S, B, U] -> logits [B, S, W].

    `weight` [W, U] is the layer's own or the tied embedding's.
    """

    def __init__(self, model: MegatronModule) -> None:
        self.model, self.layer = model, model.output_layer
        tied = model.share_embeddings_and_output_weights
        self.weight: Tensor = model.shared_embedding_or_output_weight() if tied else self.layer.weight

    def __call__(self, hidden_SBU: Tensor) -> Tensor:
        logits_SBW, _ = self.layer(hidden_SBU, weight=self.weight)
        return scaled_logits(self.model, logits_SBW).transpose(0, 1)

    def tied_to(self, module: nn.Module) -> bool:
        """Whether the module has the weight, too."""
        return any(parameter is self.weight for parameter in module.parameters())


@contextlib.contextmanager
def headless(chunk: MegatronModule) -> Iterator[Head]:
    """A context in which the chunk's forward pass ends at its last hidden state. It gives the head that is left out."""
    head, chunk.post_process = Head(chunk), False
    try:
        yield head
    finally:
        chunk.post_process = True
