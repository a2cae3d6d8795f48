"""The criteria of depth of a calibration, on a live model. A criterion that was saved is not computed again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemo_minitron.artifacts import Scores
from nemo_minitron.artifacts.blocks import NOTHING, Block
from nemo_minitron.artifacts.files import file_digest
from nemo_minitron.errors import InputError
from nemo_minitron.megatron.progress import Report, say
from nemo_minitron.settings.calibration import Calibration
from nemo_minitron.sources.tensors import ModelSource

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

    from nemo_minitron.importance.batches import Batch

LARGEST = 700.0  # a loss whose perplexity float64 can hold


class DepthCriteria:
    """The criteria of `calibration.depth` that `out` does not hold yet.

    `source`: the model on disk. `batches()`: this data-parallel rank's micro-batches, with labels, as
    `Estimation.batches` returns them. `out`: a file of Scores that has only the criteria of depth and notes; rank 0
    saves it after each criterion, so that a killed run loses at most one. Perplexity is computed from the losses, so
    both together cost one scan.
    """

    def __init__(
        self, source: ModelSource, calibration: Calibration, batches: Callable[[], list[Batch]], out: Path
    ) -> None:
        self.source, self.calibration, self.batches, self.out = source, calibration, batches, out
        self.vocab_size = source.architecture.vocab_size
        self.scores = Scores.load(out) if out.exists() else Scores(source.architecture, {})
        self._report: Report | None = None

    def run(self, chunks: list[MegatronModule]) -> None:
        """Computes what is missing, on this rank's chunks of the filled model. Collective over all ranks.

        Raises InputError for a loss whose perplexity is too large for a float, and for items of multiple choice that
        cannot be read.
        """
        import torch

        rank_zero = torch.distributed.get_rank() == 0
        gather = {
            "loss": self._loss, "perplexity": self._perplexity, "accuracy": self._accuracy, "removal": self._removal
        }  # fmt: skip
        for name in self.calibration.depth:
            if name in self.scores.depth:
                continue
            start = time.perf_counter()
            self._report = Report(f"depth: {name}", scale=self.calibration.sequence_length) if rank_zero else None
            if self._report is not None:
                self._report(0)  # only a scan of rows knows its end
            self.scores.depth[name] = gather[name](chunks)
            if rank_zero:
                self.scores.save(self.out)
                say(f"depth: {name} in {time.perf_counter() - start:.1f} s")

    def _loss(self, chunks: list[MegatronModule]) -> dict[Block, float]:
        from nemo_minitron.importance.depth import depth_scan

        return depth_scan(chunks, self._reported(), self.calibration.depth_sizes, vocab_size=self.vocab_size)

    def _reported(self) -> Iterator[Batch]:
        """The batches. On rank 0 each one is reported when the next one is asked for."""
        batches, samples = self.batches(), self.calibration.depth_samples
        for number, batch in enumerate(batches):
            if self._report is not None:
                self._report(number * samples // len(batches), samples)
            yield batch

    def _perplexity(self, chunks: list[MegatronModule]) -> dict[Block, float]:
        losses = self.scores.depth.get("loss") or self._loss(chunks)
        (first, last), most = max(losses.items(), key=lambda item: item[1])
        if most > LARGEST:
            raise InputError(
                f"the loss without the layers {first} to {last} is {most:g}; its perplexity is too large for a float; "
                "take the criterion loss"
            )
        return {block: math.exp(loss) for block, loss in losses.items()}

    def _accuracy(self, chunks: list[MegatronModule]) -> dict[Block, float]:
        from nemo_minitron.data import load_tokenizer
        from nemo_minitron.families.tokenizer import check_ids
        from nemo_minitron.importance.depth import multiple_choice, read_items

        tokenizer, items = load_tokenizer(self.source.folder), read_items(self.calibration.items)

        def tokens_of(text: str) -> list[int]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            check_ids(np.array(ids, np.int64), tokenizer, self.vocab_size, self.calibration.items)
            return ids

        answers = multiple_choice(
            chunks, items, tokens_of,
            self.calibration.depth_sizes, batch_size=self.calibration.batch_size, vocab_size=self.vocab_size,
        )  # fmt: skip
        self.scores.notes["accuracy"] = {
            "items": answers.items, "digest": file_digest(self.calibration.items),
            "standard_error": answers.standard_error[NOTHING],
        }  # fmt: skip
        return answers.accuracy

    def _removal(self, chunks: list[MegatronModule]) -> dict[Block, float]:
        from nemo_minitron.importance.depth import iterative_removal

        count = self.calibration.remove
        return iterative_removal(chunks, self.batches(), count, vocab_size=self.vocab_size).depth
