"""Accuracy of a multiple-choice task without each block of layers (2408.11796: Winogrande without 16 layers).

Shapes (docs/shapes.md): N tokens that count.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_minitron.artifacts.blocks import NOTHING, Block
from nemo_minitron.errors import InputError
from nemo_minitron.importance.depth.head import head_of, total
from nemo_minitron.importance.depth.items import Item
from nemo_minitron.importance.depth.rows import Rows, rows_of
from nemo_minitron.importance.depth.scan import blocks_of
from nemo_minitron.importance.depth.stages import Stages

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

Tokenize = Callable[[str], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The result of a task without each block. `NOTHING` is the complete model.

    `accuracy`, for `Scores.depth["accuracy"]`: the share of items whose answer is the likeliest choice. Of equal
    choices the first one counts. `ties`: the number of items whose likeliest choices were equal. `standard_error`: how
    much an accuracy would vary with other items, sqrt(p (1 - p) / items). Smaller differences say little.
    """

    items: int
    accuracy: dict[Block, float]
    ties: dict[Block, int]
    standard_error: dict[Block, float]


def multiple_choice(
    model: MegatronModule,
    items: Sequence[Item],
    tokenize: Tokenize,
    sizes: Sequence[int] = (1,),
    *,
    by_length: bool = False,
    batch_size: int = 8,
    vocab_size: int | None = None,
) -> Accuracy:
    """Accuracy of a live model without each contiguous block of `sizes` layers, the same on every rank.

    The score of a choice is the sum of its tokens' log-likelihoods after the context; with `by_length` it is divided by
    the number of the choice's characters. `items`: the same on every rank; data-parallel ranks share the work.
    `tokenize`: text -> token ids. The tokens of a choice are those of context and choice together that differ from the
    context's own. So a token that spans both counts. If no token stands before it (no context and no BOS), the first
    token of a text does not count. Layouts and `vocab_size` as for `depth_scan`. Collective over the whole job. Raises
    InputError for sizes that are not legal and for a choice without a token.
    """
    stages = Stages(model)
    blocks = [NOTHING, *blocks_of(stages.config.num_layers, sizes)]
    texts = [_Text(item, choice, tokenize) for item in items for choice in item.choices]
    likelihoods = _likelihoods(stages, blocks, texts, batch_size, vocab_size)
    if by_length:
        lengths = [text.characters for text in texts]
        likelihoods /= torch.tensor(lengths, dtype=likelihoods.dtype, device=likelihoods.device)
    counts = [len(item.choices) for item in items]
    right, ties = torch.zeros(2, len(blocks), dtype=torch.int64)
    for item, scores in zip(items, likelihoods.cpu().split(counts, dim=1), strict=True):
        right += scores.argmax(1) == item.answer
        ties += (scores == scores.amax(1, keepdim=True)).sum(1) > 1
    shares = (right.double() / len(items)).tolist()
    errors = [math.sqrt(p * (1 - p) / len(items)) for p in shares]
    columns = [dict(zip(blocks, column, strict=True)) for column in (shares, ties.tolist(), errors)]
    return Accuracy(len(items), *columns)


class _Text:
    """The tokens of context and choice. They are scored from `start` on."""

    def __init__(self, item: Item, choice: str, tokenize: Tokenize) -> None:
        self.tokens, context = list(tokenize(item.context + choice)), list(tokenize(item.context))
        pairs = zip(self.tokens, context, strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.tokens), len(context)))
        self.start, self.characters = max(shared, 1), len(choice)
        if self.start >= len(self.tokens):
            raise InputError(
                f"the choice {choice!r} has no token to score after {item.context[-40:]!r}; give a longer one"
            )


def _likelihoods(
    stages: Stages, blocks: list[Block], texts: list[_Text], batch_size: int, vocab_size: int | None
) -> Tensor:
    """fp64 [blocks, texts]: log-likelihoods, on every rank. Texts of similar lengths share a micro-batch."""
    likelihoods = torch.zeros(len(blocks), len(texts), dtype=torch.float64, device=stages.device)
    place = {block: i for i, block in enumerate(blocks)}
    head = head_of(stages, vocab_size)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].tokens))
    together = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()

    def add(rows: Rows, indices: Tensor, block: Block, hidden: Tensor) -> None:
        assert head is not None  # only the ranks with the head get a state to see
        losses = head.losses(head.logits(hidden, rows.mask), rows.labels[rows.mask])
        texts_N = indices[rows.mask.nonzero()[:, 0]]
        likelihoods[place[block]].index_add_(0, texts_N, -losses.double())

    with stages.open():
        for start in range(0, len(together), ranks):
            number = min(start + rank, len(together) - 1)  # a rank without work repeats the last batch, masked
            batch = _batch([texts[i] for i in together[number]], counts=start + rank == number)
            rows = rows_of(batch, stages.config, stages.device)
            indices = torch.tensor(together[number], device=stages.device)
            stages.run(rows, blocks[1:], partial(add, rows, indices))
        return total(likelihoods)


def _batch(texts: list[_Text], counts: bool) -> dict[str, Tensor]:
    """Rows, padded at their end. The loss mask is True where the next token is scored."""
    length = max(len(text.tokens) for text in texts)
    tokens = torch.zeros(len(texts), length, dtype=torch.int64)
    mask = torch.zeros(len(texts), length, dtype=torch.bool)
    for row, text in enumerate(texts):
        tokens[row, : len(text.tokens)] = torch.tensor(text.tokens)
        mask[row, text.start - 1 : len(text.tokens) - 1] = counts
    return {"tokens": tokens, "loss_mask": mask}
