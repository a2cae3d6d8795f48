"""The output head of a live model: this rank's shard of the logits, and log-likelihoods over all shards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from nemo_minitron.importance.depth.stages import Stages
from nemo_minitron.importance.forward import architecture_of

CHUNK = 1 << 22  # logits that are held in fp32 at a time


class Head:
    """`model`: the chunk with the output layer; `vocab_size`: the true one, what is behind it is padding."""

    def __init__(self, model: Any, vocab_size: int) -> None:
        self.model = model
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.size = torch.distributed.get_world_size(self.group)
        width = model.vocab_size // self.size
        self.start = torch.distributed.get_rank(self.group) * width
        self.width = min(max(vocab_size - self.start, 0), width)

    def logits(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """[T, V/tp] of this rank's true columns, in the model's dtype.

        `hidden` [S(/tp under sequence parallelism), B, H] before the final norm; `mask` [B, S], T of it True:
        only these positions reach the output layer, row by row.
        """
        if self.model.decoder.final_layernorm is not None:
            hidden = self.model.decoder.final_layernorm(hidden)
        tied = self.model.share_embeddings_and_output_weights
        with self._whole_sequence():
            if self.model.config.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden, group=self.group)
            chosen = hidden.transpose(0, 1)[mask]
            weight = self.model.shared_embedding_or_output_weight() if tied else None
            logits, _ = self.model.output_layer(chosen[:, None], weight=weight, runtime_gather_output=False)
        return logits[:, 0, : self.width]

    @contextlib.contextmanager
    def _whole_sequence(self) -> Iterator[None]:
        """The output layer would gather the sequence itself, also of positions that do not count."""
        layer = self.model.output_layer
        before, layer.sequence_parallel = layer.sequence_parallel, False
        try:
            yield
        finally:
            layer.sequence_parallel = before

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """-log p(label), [T] fp32, the same on every tensor-parallel rank; labels [T] are global."""
        normalizer = torch.cat([chunk.float().logsumexp(1) for chunk in chunks(logits)])
        local = labels - self.start
        mine = (local >= 0) & (local < self.width)
        target = torch.zeros_like(normalizer)
        target[mine] = logits[mine, local[mine]].float()
        if self.size > 1:
            top = normalizer.clone()
            torch.distributed.all_reduce(top, op=torch.distributed.ReduceOp.MAX, group=self.group)
            both = torch.stack([(normalizer - top).exp(), target])
            torch.distributed.all_reduce(both, group=self.group)
            normalizer, target = top + both[0].log(), both[1]
        return normalizer - target


def head_of(stages: Stages, vocab_size: int | None) -> Head | None:
    """The head, on the pipeline ranks that have it; others are never shown a hidden state."""
    if stages.head is None:
        return None
    return Head(stages.head, vocab_size or architecture_of(stages.head).vocab_size)


def chunks(logits: Tensor) -> tuple[Tensor, ...]:
    """[T, V] in parts of rows that may be copied to fp32; views."""
    return logits.split(max(1, CHUNK // max(logits.shape[1], 1)))


def total(values: Tensor, *, over_vocabulary: bool = False) -> Tensor:
    """Sums of this rank's head -> those of the whole job, the same bits on every rank.

    `values`: float64, zeros on ranks without the head. Summed over data and context parallelism and over the
    pipeline; over tensor parallelism only where each rank holds the sum of its own columns.
    """
    groups = [
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_group(),
    ]
    if over_vocabulary:
        groups.append(parallel_state.get_tensor_model_parallel_group())
    for group in groups:
        torch.distributed.all_reduce(values, group=group)
    torch.distributed.broadcast(values, 0)
    return values
