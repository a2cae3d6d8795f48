"""Measures steps: LM training of the student, the teacher's forward, distillation, and distillation from a cache.

    python benchmarks/distillation_step.py [--precision auto] [--repetitions 5] [--out FILE.json]

The teacher is demo/smollm2-135m-instruct, the student a random cut of it to 108M parameters, both on the reference
layers, the student in Megatron's DDP with its distributed Adam; one micro-batch of 1 x 512 tokens of demo/wikipedia,
two threads, one process, the steps in turn. A step is forward, backward, gradient's norm and optimizer; a cached one
reads its targets from the files first. Losses are summed, and divided by the tokens at the end, as in any distillation
here (Megatron's `calculate_per_token_loss`). The ratios are of CPU seconds, which other jobs disturb least. Two have
a limit: distillation over (teacher's forward + LM step), at most 1.05; cached over LM step, at most 1.15.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
from short_training import batch_of, in_ddp, train_step

TEXT = common.TEXT / "train.jsonl"
ROWS = 4
CACHES: dict[str, dict[str, Any]] = {
    "cached, 50 draws": {"draws": 50},
    "cached, 64 largest": {"mode": "top-k", "k": 64},
}


class Steps:
    """Each step as a function without arguments, over one student and one optimizer; batches take turns."""

    def __init__(self, model: Path, keep: dict[str, int], precision: str, length: int, work: Path) -> None:
        import torch

        from nemo_minitron.distillation.step import Objective, distillation_step
        from nemo_minitron.distillation.teacher import Teacher
        from nemo_minitron.families import from_hf
        from nemo_minitron.hosts.nemo.distill import model_inputs
        from nemo_minitron.hosts.nemo.models import load_model
        from nemo_minitron.search import random_plan

        architecture = from_hf(model)
        self.rows, self.turn = common.token_rows(model, TEXT, ROWS, length + 1), 0
        vocab = architecture.vocab_size
        chunks = load_model(model, precision=precision)
        self.caches = {name: self._cache(chunks, work / name, given, precision) for name, given in CACHES.items()}
        self.teacher = Teacher(chunks, model_inputs)
        cut = load_model(model, random_plan(architecture, keep=keep), precision=precision)
        self.student, self.optimizer = in_ddp(cut[0], precision)
        self.parameters = [sum(p.numel() for p in m.parameters()) for m in (chunks[0], self.student)]
        online = distillation_step(Objective(vocab), model_inputs, self.teacher)
        self.functions: dict[str, Callable[[], object]] = {
            "LM step": lambda: self.step(lambda m, batch: m(**model_inputs(batch), labels=batch["labels"])),
            "teacher's forward": torch.no_grad()(lambda: self.teacher.logits(self.teacher.hidden(self.batch()))),
            "distillation": lambda: self.step(online),
        }
        for name, cached in self.caches.items():
            self._add(name, cached, vocab)

    def _cache(self, chunks: list[Any], folder: Path, given: dict[str, Any], precision: str) -> Any:
        from nemo_minitron.artifacts.cache_settings import CacheSettings
        from nemo_minitron.artifacts.logit_cache import CacheHeader
        from nemo_minitron.distillation.cache import CachedTeacher, make

        tokens = self.rows[:, :-1].numpy()
        settings = CacheSettings(sequence_length=tokens.shape[1], precision=precision, **given)
        header = CacheHeader(settings, "model", "data", chunks[0].vocab_size, ROWS)
        header.save(folder)
        make(chunks, header, folder, lambda row: tokens[row])
        return CachedTeacher(folder)

    def _add(self, name: str, cached: Any, vocab: int) -> None:
        from nemo_minitron.distillation.cache.objective import CachedObjective, with_targets
        from nemo_minitron.distillation.step import distillation_step
        from nemo_minitron.hosts.nemo.distill import model_inputs

        forward = distillation_step(CachedObjective(vocab, cached=cached), model_inputs)
        data_step = with_targets(next, cached)
        self.functions[name] = lambda: self.step(forward, data_step)

    def batch(self) -> dict[str, Any]:
        """The next row as a batch."""
        self.turn += 1
        return batch_of(self.rows[self.turn % ROWS])

    def step(self, forward: Callable[[Any, Any], Any], data_step: Callable[[Any], Any] = next) -> None:
        train_step(forward, self.student, self.optimizer, self.batch(), data_step)


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    import nemo_minitron.backend as backend
    from nemo_minitron.search.parse import sizes

    backend.setup()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as work:
        keep = sizes(arguments.keep)
        steps = Steps(arguments.model, keep, arguments.precision, arguments.sequence_length, Path(work))
        seconds = common.interleaved(steps.functions, arguments.repetitions)
        disk = {
            name: round(sum(f.stat().st_size for f in Path(work, name).glob("*.logits")) / steps.rows[:, 1:].numel(), 1)
            for name in CACHES
        }
    return {"seconds": common.summary(seconds, "LM step"), "limits": limits(seconds), "bytes a token": disk,
            "parameters": steps.parameters}  # fmt: skip


def limits(found: dict[str, list[dict[str, float]]]) -> dict[str, list[float]]:
    """[median, least, most] over the rounds of the two limited ratios; the last number is the ratio of the least
    seconds."""
    import statistics

    seconds = {name: [run["cpu"] for run in runs] for name, runs in found.items()}
    both = [a + b for a, b in zip(seconds["LM step"], seconds["teacher's forward"], strict=True)]
    bases = {"distillation": both} | dict.fromkeys(CACHES, seconds["LM step"])
    ratios = {}
    for name, base in bases.items():
        each = [a / b for a, b in zip(seconds[name], base, strict=True)]
        numbers = (statistics.median(each), min(each), max(each), min(seconds[name]) / min(base))
        ratios[name] = [round(number, 3) for number in numbers]
    return ratios


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", type=Path, default=common.MODEL, help="the teacher's Hugging Face folder")
    parser.add_argument("--keep", default="ffn=1024", help="sizes that the student keeps")
    parser.add_argument("--precision", default="auto", help="auto: bf16 if the processor multiplies in it")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    from nemo_minitron.settings.precision import resolve_precision

    arguments.precision = resolve_precision(arguments.precision)
    result = common.heading(("torch", "megatron-core")) | {"precision": arguments.precision}
    result |= {"repetitions": arguments.repetitions, "columns": ["median", "least", "most"]} | measured(arguments)
    show(result)
    common.write(result, arguments.out)


def show(result: dict[str, Any]) -> None:
    print(f"{result['machine']}\nparameters: {result['parameters']}, {result['precision']}")
    print(f"{'':22}{'wall s':>24}{'CPU s':>24}{'over what it may cost':>28}{'by least':>10}{'bytes a token':>15}")
    for name, row in result["seconds"].items():
        spread = [common.with_range(row[key]) for key in ("wall", "cpu")]
        limit = result["limits"].get(name)
        ratio = common.with_range(limit) if limit else ""
        least, disk = limit[3] if limit else "", result["bytes a token"].get(name, "")
        print(f"{name:22}{spread[0]:>24}{spread[1]:>24}{ratio:>28}{least:>10}{disk:>15}")


if __name__ == "__main__":
    main()
