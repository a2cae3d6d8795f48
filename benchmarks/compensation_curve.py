"""The re-fit of a cut of neurons over calibration tokens and ridge: SmolLM2-135M, ffn 1536 -> 1024, as cut:
`python benchmarks/compensation_curve.py --novels r-cran-janeaustenr_1.0.0-1_all.deb --out RESULT.json`.

One selection, scored on the first of `--rows`, serves all points. Gram matrices are sums, so each point adds its rows
to those of the point before; each is solved with every ridge. Calibration reads the demo's Wikipedia; losses, in nats a
token, are measured on held-out Wikipedia, a novel and Python's manual (`texts.py`). A standard error is that of the
difference from the package's default ridge at as many tokens, over the held-out rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import texts
from short_training import batch_of

from nemo_minitron.settings.precision import best_precision

KEEP, HELD_OUT, LENGTH, SEED = {"ffn": 1024}, 512, 512, 1234


class Bench:
    def __init__(self, options: Any) -> None:
        import nemo_minitron.backend as backend
        from nemo_minitron.data import build, load_tokenizer
        from nemo_minitron.hosts.nemo.models import load_model
        from nemo_minitron.importance import estimate
        from nemo_minitron.search import plan
        from nemo_minitron.sources.open import open_source

        backend.setup()
        self.model, self.source, tokenizer = options.model, open_source(options.model), load_tokenizer(options.model)
        files, count = texts.write_texts(options.work, options.novels), options.tokens // HELD_OUT
        self.rows = {
            name: build(str(file), tokenizer, options.work / f"{name} tokens").windows(HELD_OUT + 1, count)
            for name, file in files.items()
        }
        train = build(str(texts.TRAIN), tokenizer, options.work / "train tokens")
        self.calibration = train.windows(LENGTH, max(options.rows), SEED)
        self.teacher = load_model(self.model)[0].eval()
        first, a = self.calibration[: min(options.rows)], self.source.architecture
        self.plan = plan(estimate(self.teacher, first.split(4), axes=("ffn",), architecture=a), KEEP)

    def losses(self, chunk: Any) -> dict[str, list[float]]:
        """Text -> the mean loss of each row."""
        import torch

        from nemo_minitron.distillation.step import Objective, distillation_step
        from nemo_minitron.hosts.nemo.distill import model_inputs

        step = distillation_step(Objective(self.source.architecture.vocab_size), model_inputs)
        chunk.eval()
        with torch.inference_mode():
            return {
                name: [step(chunk, batch_of(row)).double().mean().item() for row in rows]
                for name, rows in self.rows.items()
            }

    def student(self, tensors: dict[str, Any]) -> dict[str, list[float]]:
        from nemo_minitron.artifacts import Compensation
        from nemo_minitron.hosts.nemo.models import load_model

        compensation = Compensation(self.plan.digest, tensors)
        return self.losses(load_model(self.model, self.plan, compensation=compensation, precision=best_precision())[0])

    def points(self, numbers: list[int], ridges: list[float]) -> Iterator[tuple[int, float, dict[str, list[float]]]]:
        """(calibration tokens, ridge, losses)."""
        from nemo_minitron.importance.gram import gram
        from nemo_minitron.pruning.compensation import solvable, solve

        sums: dict[str, Any] = {}
        for before, number in zip([0, *numbers], numbers, strict=False):
            new = gram(self.teacher, self.calibration[before:number].split(4), kinds=("down",))
            sums = {name: sums[name] + found if name in sums else found for name, found in new.items()}
            for ridge in ridges:
                tensors = {
                    name: solve(self.source, self.plan, name, sums[origin].numpy(), ridge)
                    for name, origin in solvable(self.plan)
                }
                yield number * LENGTH, ridge, self.student(tensors)


def compared(found: dict[str, list[float]], base: dict[str, list[float]], name: str) -> list[float]:
    """[difference of the loss, its standard error over the rows]."""
    pairs = [a - b for a, b in zip(found[name], base[name], strict=True)]
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return [round(statistics.fmean(pairs), 4), round(error, 4)]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default=str(common.MODEL))
    parser.add_argument("--work", type=Path, default=common.ROOT / "runs/compensation_curve")
    parser.add_argument("--novels", type=Path, help="the .deb of r-cran-janeaustenr; needed once")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32, 64, 128], help="of 512 tokens, ascending")
    parser.add_argument("--ridge", type=float, nargs="+", default=[0.003, 0.01, 0.03])
    parser.add_argument("--tokens", type=int, default=8192, help="of each held-out text")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    import torch

    from nemo_minitron.pruning.defaults import RIDGE

    torch.set_num_threads(1)
    result, bench = common.heading(("torch", "numpy", "megatron-core")), Bench(options)
    slices, rows = bench.student({}), []
    found = {}
    for tokens, ridge, losses in bench.points(options.rows, options.ridge):
        found[tokens, ridge] = losses
        print(tokens, ridge, {name: round(statistics.fmean(each), 4) for name, each in losses.items()}, flush=True)
    for (tokens, ridge), losses in found.items():
        row: dict[str, Any] = {"calibration tokens": tokens, "ridge": ridge}
        for name in texts.TEXTS:
            row[name] = {
                "loss": round(statistics.fmean(losses[name]), 4),
                "difference to slices": compared(losses, slices, name),
                "difference to the default ridge": compared(losses, found.get((tokens, RIDGE), losses), name),
            }
        rows.append(row)
    settings = {
        "keep": KEEP,
        "held-out tokens": options.tokens,
        "seed": SEED,
        "precision": f"{best_precision()}, fp32 to fit",
    }
    plain = {name: round(statistics.fmean(each), 4) for name, each in slices.items()}
    common.write({**result, "settings": settings, "slices": plain, "rows": rows}, options.out)


if __name__ == "__main__":
    main()
