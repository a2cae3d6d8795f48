"""The output head of a live model: this rank's shard of the logits, and log-likelihoods over all shards.

Shapes (docs/shapes.md): S positions of the sequence, B sequences, H hidden size, N tokens that count, W columns of the
vocabulary on this rank (without padding).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from nemo_minitron.backend.differences import scaled_logits
from nemo_minitron.importance.depth.stages import Stages
from nemo_minitron.importance.forward import architecture_of

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

CHUNK = 1 << 22  # logits that are converted to fp32 at a time


class Head:
    """`model`: the chunk with the output layer. `vocab_size`: without padding."""

    def __init__(self, model: MegatronModule, vocab_size: int) -> None:
        self.model = model
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.size = torch.distributed.get_world_size(self.group)
        width = model.vocab_size // self.size
        self.start = torch.distributed.get_rank(self.group) * width
        self.width = min(max(vocab_size - self.start, 0), width)

    def logits(self, hidden_SBH: Tensor, mask_BS: Tensor) -> Tensor:
        """[N, W] in the model's dtype.

        `hidden_SBH` is the state before the final norm, S / tp under sequence parallelism. `mask_BS` has the whole
        sequence. Only the N positions where it is True reach the output layer, row by row.
        """
        if self.model.decoder.final_layernorm is not None:
            hidden_SBH = self.model.decoder.final_layernorm(hidden_SBH)
        tied = self.model.share_embeddings_and_output_weights
        with self._whole_sequence():
            if self.model.config.sequence_parallel:
                hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, group=self.group)
            chosen_NH = hidden_SBH.transpose(0, 1)[mask_BS]
            weight_WH = self.model.shared_embedding_or_output_weight() if tied else None
            output, _ = self.model.output_layer(chosen_NH[:, None], weight=weight_WH, runtime_gather_output=False)
        return scaled_logits(self.model, output)[:, 0, : self.width]

    @contextlib.contextmanager
    def _whole_sequence(self) -> Iterator[None]:
        """A context in which the output layer does not gather the sequence: `logits` has gathered it already."""
        layer = self.model.output_layer
        before, layer.sequence_parallel = layer.sequence_parallel, False
        try:
            yield
        finally:
            layer.sequence_parallel = before

    def losses(self, logits_NW: Tensor, labels_N: Tensor) -> Tensor:
        """fp32 [N]: -log p(label), the same on every tensor-parallel rank. Labels are global ids."""
        normalizer_N = torch.cat([chunk_NW.float().logsumexp(1) for chunk_NW in chunks(logits_NW)])
        columns_N = labels_N - self.start
        here_N = (columns_N >= 0) & (columns_N < self.width)
        target_N = torch.zeros_like(normalizer_N)
        target_N[here_N] = logits_NW[here_N, columns_N[here_N]].float()
        if self.size > 1:
            max_N = normalizer_N.clone()
            torch.distributed.all_reduce(max_N, op=torch.distributed.ReduceOp.MAX, group=self.group)
            sums_2N = torch.stack([(normalizer_N - max_N).exp(), target_N])
            torch.distributed.all_reduce(sums_2N, group=self.group)
            normalizer_N, target_N = max_N + sums_2N[0].log(), sums_2N[1]
        return normalizer_N - target_N


def head_of(stages: Stages, vocab_size: int | None) -> Head | None:
    """The head, on the pipeline ranks that have it. None on the others, which never get a hidden state to see."""
    if stages.head is None:
        return None
    return Head(stages.head, vocab_size or architecture_of(stages.head).vocab_size)


def chunks(logits_NW: Tensor) -> tuple[Tensor, ...]:
    """Views of so many rows each that a copy of them in fp32 is small."""
    return logits_NW.split(max(1, CHUNK // max(logits_NW.shape[1], 1)))


def total(values: Tensor, *, over_vocabulary: bool = False) -> Tensor:
    """Sums of this rank's head -> those of the whole job, the same bits on every rank.

    `values`: float64, zeros on ranks without the head. They are summed over data and context parallelism and over the
    pipeline. `over_vocabulary`: also over tensor parallelism, because each rank has the sums of its own columns.
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
