"""The estimate stage as NeMo runs it: statistics are `trainer.validate`, the criteria of depth follow on its model."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

import nemo_minitron.backend as backend
from nemo_minitron.artifacts import Scores
from nemo_minitron.artifacts.blocks import NOTHING, Block
from nemo_minitron.artifacts.files import file_digest
from nemo_minitron.job.calibration import SCANNED, STATISTICS, Calibration
from nemo_minitron.job.layout import Layout
from nemo_minitron.nemo.trainer import chunks_of, leave_context, make_trainer


def estimate(settings: dict[str, Any]) -> None:
    """`model`, `data` (.bin/.idx prefix), `work` (a folder), `calibration`, `layout`.

    Leaves `work/statistics.safetensors` (Scores of the rows, without depth) and `work/depth.safetensors` (Scores
    with depth alone), and goes on from what it finds of them.
    """
    backend.setup()
    from nemo_minitron.nemo.models import load_model

    calibration, layout = Calibration(**settings["calibration"]), Layout(**settings["layout"])
    work = Path(settings["work"])
    depth = DepthCriteria(settings["model"], settings["data"], calibration, work / SCANNED)
    before = Scores.load(work / STATISTICS) if (work / STATISTICS).exists() else None
    if before is None or before.samples < calibration.samples:
        gather(settings, calibration, layout, before, depth)
    else:
        depth.run(load_model(settings["model"], precision=calibration.precision, layout=layout))


def gather(
    settings: dict[str, Any], calibration: Calibration, layout: Layout, before: Scores | None, depth: DepthCriteria
) -> None:
    """The rows that are still to come, through `trainer.validate`; `depth` runs at its end, on the same model."""
    from nemo_minitron.nemo.callbacks import Importance
    from nemo_minitron.nemo.data import Tokens, data_module
    from nemo_minitron.nemo.data.dataset import windowed
    from nemo_minitron.nemo.distill import FillStudent
    from nemo_minitron.nemo.models import nemo_model
    from nemo_minitron.nemo.sources import open_source

    source, work = open_source(settings["model"]), Path(settings["work"])
    Tokens(settings["data"]).windows(calibration.sequence_length + 1, calibration.samples)  # refuses a short corpus
    whole = calibration.batch_size * layout.dp * (layout.pp if layout.vp > 1 else 1)  # virtual stages want pp batches
    done = before.samples if before else 0
    batches = -(-(calibration.samples - done) // whole)
    data = data_module(
        settings["data"], settings["data"], tokenizer=str(source.folder), seed=calibration.seed,
        sequence_length=calibration.sequence_length, micro_batch_size=calibration.batch_size,
        global_batch_size=whole, index_folder=work / "index",
    )  # fmt: skip
    data.dataset_cls = windowed(done, calibration.samples, batches * whole)
    trainer = make_trainer(
        layout, calibration.precision, limit_val_batches=batches, logger=False, max_steps=1, enable_checkpointing=False
    )
    importance = Importance(
        None, calibration.criteria, calibration.norms, calibration.statistics, previous=before,
        save_every=max(1, calibration.save_every // whole), partial=str(work / STATISTICS),
    )  # fmt: skip
    progress = Progress(calibration, done, whole)
    trainer.callbacks.extend([FillStudent(settings["model"]), importance, progress, depth])
    model = nemo_model(source.config, tokenizer=data.tokenizer, precision=calibration.precision, layout=layout)
    trainer.validate(model, data, verbose=False)


class DepthCriteria(Callback):
    """The criteria of `calibration.depth` that `out` does not hold yet, on the model that was validated.

    `out` is saved after each of them: Scores with nothing but depth, and notes. Loss and perplexity are one scan.
    Rows are windows of the corpus in the order of `calibration.seed`, dealt out to data-parallel ranks.
    """

    def __init__(self, model: str, data: str, calibration: Calibration, out: Path) -> None:
        from nemo_minitron.nemo.sources import open_source

        self.source, self.data, self.calibration, self.out = open_source(model), data, calibration, out
        self.scores = Scores.load(out) if out.exists() else Scores(self.source.architecture, {})

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.run(chunks_of(trainer))

    def run(self, chunks: list[Any]) -> None:
        """Collective over the whole job."""
        import torch

        for name in self.calibration.depth:
            if name in self.scores.depth:
                continue
            start = time.perf_counter()
            getattr(self, f"_{name}")(chunks)
            if torch.distributed.get_rank() == 0:
                self.scores.save(self.out)
                say(f"depth: {name} in {time.perf_counter() - start:.1f} s")

    def _loss(self, chunks: list[Any]) -> None:
        self.scores.depth["loss"] = self._scan(chunks)

    def _perplexity(self, chunks: list[Any]) -> None:
        losses = self.scores.depth.get("loss") or self._scan(chunks)
        self.scores.depth["perplexity"] = {block: math.exp(loss) for block, loss in losses.items()}

    def _scan(self, chunks: list[Any]) -> dict[Block, float]:
        from nemo_minitron.importance.depth import depth_scan

        sizes, vocab_size = self.calibration.depth_sizes, self.source.architecture.vocab_size
        return depth_scan(chunks, self._batches(), sizes, vocab_size=vocab_size)

    def _accuracy(self, chunks: list[Any]) -> None:
        from nemo_minitron.importance.depth import multiple_choice, read_items
        from nemo_minitron.nemo.data import load_tokenizer

        tokenizer, items = load_tokenizer(self.source.folder), read_items(self.calibration.items)
        found = multiple_choice(
            chunks, items, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
            self.calibration.depth_sizes, batch_size=self.calibration.batch_size,
            vocab_size=self.source.architecture.vocab_size,
        )  # fmt: skip
        self.scores.depth["accuracy"] = found.accuracy
        self.scores.notes["accuracy"] = {
            "items": found.items, "digest": file_digest(self.calibration.items),
            "standard_error": found.standard_error[NOTHING],
        }  # fmt: skip

    def _removal(self, chunks: list[Any]) -> None:
        from nemo_minitron.importance.depth import iterative_removal

        vocab_size = self.source.architecture.vocab_size
        removal = iterative_removal(chunks, self._batches(), self.calibration.remove, vocab_size=vocab_size)
        self.scores.depth["removal"] = removal.depth

    def _batches(self) -> list[dict[str, Any]]:
        """This data-parallel rank's rows, labels and all; as many batches on every rank, filled up with masked rows."""
        import torch
        from megatron.core import parallel_state

        from nemo_minitron.nemo.data import Tokens

        size, length = self.calibration.batch_size, self.calibration.sequence_length
        rows = Tokens(self.data).windows(length + 1, self.calibration.depth_samples, self.calibration.seed)
        ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        missing = -len(rows) % (size * ranks)
        mask = torch.cat([torch.ones(len(rows), length), torch.zeros(missing, length)])
        rows = torch.cat([rows, rows[:1].expand(missing, -1)])
        own = zip(rows.split(size)[rank::ranks], mask.split(size)[rank::ranks], strict=True)
        return [{"tokens": row[:, :-1], "labels": row[:, 1:], "loss_mask": counts} for row, counts in own]


class Progress(Callback):
    """A line every ten seconds: rows, tokens a second, what is left."""

    def __init__(self, calibration: Calibration, done: int, whole: int) -> None:
        self.calibration, self.done, self.whole = calibration, done, whole
        self._start = self._said = 0.0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._start = self._said = time.perf_counter()
        if trainer.is_global_zero and self.done:
            say(f"calibration: {self.done} of {self.calibration.samples} rows were done before, goes on from there")

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int, *_: Any
    ) -> None:
        now, rows = time.perf_counter(), (index + 1) * self.whole
        if not trainer.is_global_zero or now - self._said < 10:
            return
        self._said, rate = now, rows / (now - self._start)
        left = max(0, self.calibration.samples - self.done - rows)
        say(
            f"calibration: row {self.done + rows}/{self.calibration.samples}  "
            f"{rate * self.calibration.sequence_length:.0f} tokens/s  {left / rate:.0f} s left"
        )


def say(line: str) -> None:
    """A line of progress, which the launcher passes on to the screen."""
    sys.stdout.write(f"  > {line}\n")  # one write, newline and all: other ranks print too
    sys.stdout.flush()
