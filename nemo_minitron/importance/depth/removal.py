"""Layers taken out one by one, each time the one whose absence changes the logits least (MINITRON, section 1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.artifacts.blocks import NOTHING, Block
from nemo_minitron.errors import InputError, nearest
from nemo_minitron.importance.depth.head import chunks, head_of, total
from nemo_minitron.importance.depth.rows import Rows, all_rows
from nemo_minitron.importance.depth.stages import Stages

REFERENCES = ("source", "round")


@dataclasses.dataclass(frozen=True)
class Removal:
    """`order`: removed source layers, the first removed first; `errors`: of each removal, in that order.

    `rounds[r]`: the error of every layer that was there in round r, by its number.
    """

    order: list[int]
    errors: list[float]
    rounds: list[dict[int, float]]

    @property
    def depth(self) -> dict[Block, float]:
        """For `Scores.depth["removal"]`: in the order of removal, which is the criterion."""
        return {(layer, layer): error for layer, error in zip(self.order, self.errors, strict=True)}


def iterative_removal(
    model: Any, batches: Iterable[Any], count: int, against: str = "source", *, vocab_size: int | None = None
) -> Removal:
    """Removes `count` layers of a live model, one a round: the one with the least normalised logit error.

    Without layer j the error is sum (M - M_j)^2 / sum M^2 over all logits of unmasked tokens (true
    vocabulary). M is the whole model's (`against="source"`), or that of what the round began with ("round",
    which costs no pass of the whole model in later rounds). Of equal errors the later layer goes. Nothing is
    removed from `model` itself. Layouts, batches and `vocab_size` as for `depth_scan`; all batches are read in
    every round, one batch's logits and hidden states are held at a time. Raises InputError for a count or a
    reference that is not legal, and where no token counts.
    """
    if against not in REFERENCES:
        raise InputError(f"against='{against}' is unknown; {nearest(against, REFERENCES)}")
    stages, given = Stages(model), list(batches)
    kept, most = list(range(stages.config.num_layers)), stages.config.num_layers - 1
    if not isinstance(count, Integral) or not 1 <= count <= most:
        near = min(max(int(count), 1), most) if isinstance(count, Integral) else 1
        raise InputError(f"count={count!r} is not legal; legal are 1 to {most} layers, the nearest is {near}")
    removal = Removal([], [], [])
    with stages.open():
        for _ in range(count):
            errors = _round(stages, given, kept, against, vocab_size)
            least = min(errors, key=lambda layer: (errors[layer], -layer))
            kept.remove(least)
            removal.order.append(least)
            removal.errors.append(errors[least])
            removal.rounds.append(errors)
    return removal


def _round(
    stages: Stages, batches: list[Any], kept: list[int], against: str, vocab_size: int | None
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
    """`sums` [layers + 1], fp64: squared differences of each dropped position; squared logits of the reference."""

    def __init__(self, stages: Stages, count: int, vocab_size: int | None) -> None:
        self.sums = torch.zeros(count + 1, dtype=torch.float64, device=stages.device)
        self.head: Any = head_of(stages, vocab_size)
        self._logits: Any = None

    def see(self, rows: Rows, block: Block, hidden: Tensor) -> None:
        """The undropped state, of which the others differ, then those."""
        if block == NOTHING:
            self.refer(rows, block, hidden)
        else:
            self.add(rows, block, hidden)

    def refer(self, rows: Rows, block: Block, hidden: Tensor) -> None:
        self._logits = self.head.logits(hidden, rows.mask)
        self.sums[-1] += sum(_squares(part.float()) for part in chunks(self._logits))

    def add(self, rows: Rows, block: Block, hidden: Tensor) -> None:
        if block != NOTHING:
            logits = self.head.logits(hidden, rows.mask)
            pairs = zip(chunks(self._logits), chunks(logits), strict=True)
            self.sums[block[0]] += sum(_squares(a.float() - b.float()) for a, b in pairs)


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(1).sum(dtype=torch.float64)
