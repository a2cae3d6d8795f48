"""The re-fit after a cut over calibration tokens and ridge: SmolLM2-135M, ffn 1536 -> 1024 and heads 9 -> 6, as cut:
`python benchmarks/compensation_curve.py --novels r-cran-janeaustenr_1.0.0-1_all.deb`.

One selection a cut, scored on the first of `--rows`, serves all points. Gram matrices are sums, so each point adds its
rows to those of the point before. Arms: a number is one ridge for all matrices; `chosen`: each matrix has the ridge
with which fits to every other row, and to the rows between, leave the least error on the rows that they did not read
(`chosen_ridge.py`); `chosen, half`: half of that ridge, which is as much damping of twice as many rows. Calibration
reads the demo's Wikipedia; losses, in nats a token, are measured on held-out texts (`texts.py`). A standard error is
that of the difference, over the held-out rows: from slices, and from the package's default ridge at as many tokens.
Each point is written to `--out` as it comes, and its sums to `--work`; a second start goes on from there.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import texts
from short_training import batch_of

CUTS, HELD_OUT, LENGTH, SEED = {"ffn": 1024, "heads": 6}, 512, 512, 1234
MATRIX = {"ffn": "down", "heads": "o"}  # that loses inputs
CHOSEN, HALF = "chosen", "chosen, half"


class Bench:
    """The teacher, the held-out rows, the calibration, and a plan; `student` cuts by `plan`."""

    def __init__(self, options: Any) -> None:
        import nemo_minitron.backend as backend
        from nemo_minitron.data import build, load_tokenizer
        from nemo_minitron.hosts.nemo.models import load_model
        from nemo_minitron.importance import estimate
        from nemo_minitron.search import plan
        from nemo_minitron.sources.open import open_source

        backend.setup()
        self.model, self.source, tokenizer = options.model, open_source(options.model), load_tokenizer(options.model)
        self.work, self.precision = options.work, options.precision
        files, count = texts.write_texts(options.work, options.novels), options.tokens // HELD_OUT
        self.rows = {
            name: build(str(files[name]), tokenizer, options.work / f"{name} tokens").windows(HELD_OUT + 1, count)
            for name in options.texts
        }
        train = build(str(texts.TRAIN), tokenizer, options.work / "train tokens")
        self.calibration = train.windows(LENGTH, max(options.rows), SEED)
        self.teacher = load_model(self.model)[0].eval()
        first, a = self.calibration[: min(options.rows)], self.source.architecture
        scores = estimate(self.teacher, first.split(4), axes=options.cuts, architecture=a)
        self.plans = {axis: plan(scores, {axis: CUTS[axis]}) for axis in options.cuts}
        self.plan = next(iter(self.plans.values()))

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
        return self.losses(load_model(self.model, self.plan, compensation=compensation, precision=self.precision)[0])


class Curve(Bench):
    """The points of the curve."""

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.ridges: dict[tuple[str, str, float], float] = {}

    def halves(self, numbers: list[int]) -> Iterator[tuple[int, tuple[dict[str, Any], dict[str, Any]], float]]:
        """(Rows, the Gram matrices of every other one and those of the others, CPU seconds for them)."""
        import torch

        from nemo_minitron.importance.gram import gram

        sums: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        seconds = 0.0
        for before, number in zip([0, *numbers], numbers, strict=False):
            file, clock = self.work / f"halves of {number} rows.pt", time.process_time()
            if file.exists():
                sums, seconds = torch.load(file, weights_only=True)
            else:
                for half, sum_ in enumerate(sums):
                    new = gram(self.teacher, self.calibration[before:number][half::2].split(4), kinds=MATRIX.values())
                    sum_.update({name: sum_[name] + found if sum_ else found for name, found in new.items()})
                seconds += time.process_time() - clock
                torch.save((sums, seconds), file)
            yield number, sums, seconds

    def solved(self, arm: str, halves: tuple[dict[str, Any], dict[str, Any]]) -> tuple[dict[str, Any], list[float]]:
        """(The re-fitted matrices, the ridge of each)."""
        from nemo_minitron.pruning.compensation import solvable, solve

        tensors, ridges = {}, []
        for name, origin in solvable(self.plan):
            first, second = (half[origin].numpy() for half in halves)
            if arm in (CHOSEN, HALF):
                ridges.append(self.chosen(name, first, second) / (1 if arm == CHOSEN else 2))
            else:
                ridges.append(float(arm))
            tensors[name] = solve(self.source, self.plan, name, first + second, ridges[-1])
        return tensors, ridges

    def chosen(self, name: str, first: Any, second: Any) -> float:
        from chosen_ridge import chosen

        key = (self.plan.digest, name, float(first.trace()))  # both arms of a point need it
        if key not in self.ridges:
            self.ridges[key] = chosen(self.source, self.plan, name, (first, second))
        return self.ridges[key]


def compared(found: dict[str, list[float]], base: dict[str, list[float]], name: str) -> list[float]:
    """[difference of the loss, its standard error over the rows]."""
    pairs = [a - b for a, b in zip(found[name], base[name], strict=True)]
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return [round(statistics.fmean(pairs), 4), round(error, 4)]


class Results:
    """The result file: a row for each cut, number of tokens and arm."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        from nemo_minitron.pruning.defaults import RIDGE

        head = common.heading(("torch", "numpy", "megatron-core"))
        self.out, self.default = out, str(RIDGE)
        self.result = json.loads(out.read_text()) if out.exists() else {**head, "settings": settings, "rows": []}
        if self.result["settings"] != settings:
            raise SystemExit(f"{out} was started with {self.result['settings']}, not {settings}; give another --out")
        commands = self.result.setdefault("commands", [])
        commands.extend({head["command"]} - {*commands})

    def find(self, cut: str, tokens: int, arm: str) -> dict[str, Any] | None:
        key = (cut, tokens, arm)
        return next((r for r in self.result["rows"] if (r["cut"], r["tokens"], r["arm"]) == key), None)

    def add(self, cut: str, tokens: int, arm: str, losses: dict[str, list[float]], **more: Any) -> None:
        row: dict[str, Any] = {"cut": cut, "tokens": tokens, "arm": arm, **more}
        row |= {name: round(statistics.fmean(each), 4) for name, each in losses.items()}
        for title, base in (("slices", self.find(cut, 0, "slices")), ("default", self.find(cut, tokens, self.default))):
            if base is not None:
                each = base["loss of each row"]
                row[f"difference to {title}"] = {name: compared(losses, each, name) for name in losses}
        self.result["rows"].append(row | {"loss of each row": {n: [round(x, 5) for x in v] for n, v in losses.items()}})
        common.write(self.result, self.out)
        print(row, flush=True)


def run(bench: Curve, results: Results, numbers: list[int], arms: list[str]) -> None:
    for cut, plan in bench.plans.items():
        bench.plan = plan
        if not results.find(cut, 0, "slices"):
            results.add(cut, 0, "slices", bench.student({}))
    for number, halves, seconds in bench.halves(numbers):
        for cut, plan in bench.plans.items():
            bench.plan = plan
            for arm in [arm for arm in arms if not results.find(cut, number * LENGTH, arm)]:
                clock = time.process_time()
                tensors, ridges = bench.solved(arm, halves)
                cost: dict[str, Any] = {"CPU s of sums": round(seconds)}
                cost["CPU s to solve"] = round(time.process_time() - clock, 1)
                rounded = [float(f"{ridge:.3g}") for ridge in ridges]
                cost["ridges"] = rounded if arm in (CHOSEN, HALF) else rounded[:1]
                results.add(cut, number * LENGTH, arm, bench.student(tensors), **cost)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default=str(common.MODEL))
    parser.add_argument("--work", type=Path, default=common.ROOT / "runs/compensation_curve")
    parser.add_argument("--novels", type=Path, help="the .deb of r-cran-janeaustenr; needed once")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="of 512 tokens, ascending")
    parser.add_argument("--arms", nargs="+", default=["0.01", CHOSEN, HALF], help="ridges; the default one first")
    parser.add_argument("--cuts", nargs="+", default=list(CUTS), choices=list(CUTS))
    parser.add_argument("--tokens", type=int, default=4096, help="of each held-out text")
    parser.add_argument("--texts", nargs="+", default=["wikipedia", "manual"], choices=texts.TEXTS)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of what is measured")
    parser.add_argument("--out", type=Path, default=common.dated("compensation_curve"))
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    settings = {"keep": CUTS, "held-out tokens": options.tokens, "texts": options.texts, "seed": SEED}
    settings |= {"precision": options.precision, "tokens of the selection": min(options.rows) * LENGTH}
    run(Curve(options), Results(options.out, settings), options.rows, options.arms)


if __name__ == "__main__":
    main()
