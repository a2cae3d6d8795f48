"""LM loss without each layer, or without each contiguous block of layers (2407.14679, section 2.2; 2408.11796)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_minitron.artifacts.blocks import NOTHING, Block
from nemo_minitron.errors import InputError, nearest
from nemo_minitron.importance.depth.head import head_of, total
from nemo_minitron.importance.depth.rows import Rows, all_rows
from nemo_minitron.importance.depth.stages import Stages

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

    from nemo_minitron.importance.batches import Batch

METRICS = ("loss", "perplexity")


def depth_scan(
    model: MegatronModule,
    batches: Iterable[Batch | Tensor],
    sizes: Sequence[int] = (1,),
    metric: str = "loss",
    *,
    vocab_size: int | None = None,
) -> dict[Block, float]:
    """Loss of a live model without each contiguous block of `sizes` layers: {(first, last): loss}.

    `first` and `last`: 0-based numbers of the source's layers; both are dropped. `NOTHING`, (0, -1), is the complete
    model. The loss is the mean next-token cross-entropy over unmasked tokens, in nats; `metric="perplexity"`: its
    exponential. It is the same on every rank, for `Scores.depth[metric]`.

    `model`: a Megatron model or a list of its chunks. `vocab_size`: without padding; needed if the model's vocabulary
    is padded and NeMo did not record the true size. `batches`: this data-parallel rank's micro-batches of complete rows
    (under context parallelism, too), as `rows_of` takes them. The hidden states of one batch are in memory at a time.
    Collective over the whole job. A mixture of experts needs the same number of batches on every data-parallel rank.
    Raises InputError for sizes or metrics that are not legal, and if there are no batches or no tokens that count.
    """
    if metric not in METRICS:
        raise InputError(f"metric '{metric}' is unknown; {nearest(metric, METRICS)}")
    stages = Stages(model)
    blocks = blocks_of(stages.config.num_layers, sizes)
    place = {block: i for i, block in enumerate([NOTHING, *blocks])}
    sums = torch.zeros(len(place) + 1, dtype=torch.float64, device=stages.device)  # a loss a block, then the tokens
    head = head_of(stages, vocab_size)

    def add(rows: Rows, block: Block, hidden: torch.Tensor) -> None:
        assert head is not None  # only the ranks with the head get a state to see
        losses = head.losses(head.logits(hidden, rows.mask), rows.labels[rows.mask])
        sums[place[block]] += losses.sum(dtype=torch.float64)
        if block == NOTHING:
            sums[-1] += losses.numel()

    with stages.open():
        for rows in all_rows(batches, stages.config, stages.device):
            stages.run(rows, blocks, partial(add, rows))
        *losses, tokens = total(sums).tolist()
    if not tokens:
        raise InputError("every token of the batches is masked; at least one must count")
    means = torch.tensor(losses, dtype=torch.float64) / tokens
    return dict(zip(place, (means if metric == "loss" else means.exp()).tolist(), strict=True))


def blocks_of(num_layers: int, sizes: Sequence[int]) -> list[Block]:
    """All contiguous blocks of these sizes, sorted. Raises InputError for a size that leaves no layer."""
    for size in sizes:
        if not isinstance(size, Integral) or not 1 <= size < num_layers:
            near = min(max(int(size), 1), num_layers - 1) if isinstance(size, Integral) else 1
            raise InputError(
                f"blocks of {size!r} layers are not legal in a model of {num_layers}; legal are 1 to "
                f"{num_layers - 1}, the nearest is {near}"
            )
    return sorted((first, first + n - 1) for n in set(sizes) for first in range(num_layers - n + 1))
