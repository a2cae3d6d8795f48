"""Layers are removed one by one, each time the layer whose absence changes the logits least (docs/method.md).

Shapes (docs/shapes.md): N tokens that count, W columns of the vocabulary on this rank, S positions of the sequence, B
sequences, H hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_minitron.artifacts.blocks import NOTHING, Block
from nemo_minitron.errors import InputError, nearest
from nemo_minitron.importance.depth.head import chunks, head_of, total
from nemo_minitron.importance.depth.rows import Rows, all_rows
from nemo_minitron.importance.depth.stages import Stages

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

    from nemo_minitron.importance.batches import Batch

REFERENCES = ("source", "round")


@dataclasses.dataclass(frozen=True)
class Removal:
    """`order`: the removed source layers, in the order of removal. `errors`: the error of each removal, in that order.

    `rounds[r]`: the error of every layer that was still there in round r, by its number.
    """

    order: list[int]
    errors: list[float]
    rounds: list[dict[int, float]]

    @property
    def depth(self) -> dict[Block, float]:
        """The values for `Scores.depth["removal"]`, in the order of removal."""
        return {(layer, layer): error for layer, error in zip(self.order, self.errors, strict=True)}


def iterative_removal(
    model: MegatronModule,
    batches: Iterable[Batch | Tensor],
    count: int,
    against: str = "source",
    *,
    vocab_size: int | None = None,
) -> Removal:
    """Removes `count` layers of a live model, one a round: the layer with the least normalised error of the logits.

    The error without layer j is sum (M - M_j)^2 / sum M^2, over the logits M of all unmasked tokens (without padding of
    the vocabulary). M belongs to the complete model (`against="source"`) or to the model that the round began with
    ("round", which needs no pass of the complete model in later rounds). Of layers with equal
    errors the later one is removed. `model`
    itself keeps all its layers. Layouts, batches and `vocab_size` as for `depth_scan`. Every round reads all batches,
    and the logits and hidden states of one batch are in memory at a time. Collective over the whole job. Raises
    InputError for a count or a reference that is not legal, and if no token counts.
    """
    if against not in REFERENCES:
        raise InputError(f"against='{against}' is unknown; {nearest(against, REFERENCES)}")
    stages, batches = Stages(model), list(batches)
    kept, most = list(range(stages.config.num_layers)), stages.config.num_layers - 1
    if not isinstance(count, Integral) or not 1 <= count <= most:
        near = min(max(int(count), 1), most) if isinstance(count, Integral) else 1
        raise InputError(f"count={count!r} is not legal; legal are 1 to {most} layers, the nearest is {near}")
    removal = Removal([], [], [])
    with stages.open():
        for _ in range(count):
            errors = _round(stages, batches, kept, against, vocab_size)
            least = min(errors, key=lambda layer: (errors[layer], -layer))
            kept.remove(least)
            removal.order.append(least)
            removal.errors.append(errors[least])
            removal.rounds.append(errors)
    return removal


def _round(
    stages: Stages, batches: list[Batch | Tensor], kept: list[int], against: str, vocab_size: int | None
) -> dict[int, float]:
    errors = Errors(stages, len(kept), vocab_size)
    for rows in all_rows(batches, stages.config, stages.device):
        if against == "source" and len(kept) < stages.config.num_layers:
            stages.run(rows, [], partial(errors.refer, rows))
            stages.run(rows, _singles(kept), partial(errors.add, rows), kept)
        else:
            stages.run(rows, _singles(kept), partial(errors.see, rows), kept)
    *squares, norm = total(errors.sums, over_vocabulary=True).tolist()
    if not norm:
        raise InputError("every token of the batches is masked, or every logit is 0; at least one must count")
    return {layer: square / norm for layer, square in zip(kept, squares, strict=True)}


def _singles(kept: list[int]) -> list[Block]:
    return [(position, position) for position in range(len(kept))]


class Errors:
    """`sums` fp64 [layers + 1]: the squared differences without each layer, and the squared logits of the reference."""

    def __init__(self, stages: Stages, count: int, vocab_size: int | None) -> None:
        self.sums = torch.zeros(count + 1, dtype=torch.float64, device=stages.device)
        self.head = head_of(stages, vocab_size)
        self._reference_NW: Tensor | None = None

    def see(self, rows: Rows, block: Block, hidden_SBH: Tensor) -> None:
        """Takes the state of the complete model first, as the reference, then those without a layer."""
        if block == NOTHING:
            self.refer(rows, block, hidden_SBH)
        else:
            self.add(rows, block, hidden_SBH)

    def refer(self, rows: Rows, block: Block, hidden_SBH: Tensor) -> None:
        """Makes this state the reference."""
        assert self.head is not None  # only the ranks with the head get a state to see
        self._reference_NW = self.head.logits(hidden_SBH, rows.mask)
        self.sums[-1] += sum(_squares(part_NW.float()) for part_NW in chunks(self._reference_NW))

    def add(self, rows: Rows, block: Block, hidden_SBH: Tensor) -> None:
        """Adds the difference of this state to the reference."""
        if block != NOTHING:
            assert self.head is not None
            logits_NW = self.head.logits(hidden_SBH, rows.mask)
            pairs = zip(chunks(self._reference_NW), chunks(logits_NW), strict=True)
            self.sums[block[0]] += sum(_squares(a.float() - b.float()) for a, b in pairs)


def _squares(x_NW: Tensor) -> Tensor:
    return x_NW.square().sum(1).sum(dtype=torch.float64)
