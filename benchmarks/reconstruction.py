"""Sub-blocks fitted as a whole (`cutting.reconstruct`) over calibration rows and passes, in cuts of SmolLM2-135M:
`python benchmarks/reconstruction.py --novels r-cran-janeaustenr_1.0.0-1_all.deb --out RESULT.json`.

One selection, of 8,192 tokens, serves all points. Each point is `minitron compensate` with so many rows of 512 tokens
and so many passes; 0 passes are the least squares alone. Losses, of students as cut, are nats a token on held-out
Wikipedia, a novel and Python's manual (`texts.py`); the calibration reads Wikipedia's other articles. The error of a
difference from the least squares of as many rows is the standard error over the held-out rows. Files of `quality.py`
are shared, and each point is written as it comes.
"""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

import common
import texts
from compensation_curve import compared
from quality import BATCH, CUTS, SEED, Bench, Results

from nemo_minitron.settings.precision import best_precision


class Points(Bench):
    """The students of all points."""

    def run(self) -> None:
        o = self.options
        for cut, rows, passes in itertools.product(o.cuts, o.rows, o.passes):
            if not self.results.find(cut, f"{passes} passes", 0, rows * 512):
                self.point(cut, rows, passes)

    def point(self, cut: str, rows: int, passes: int) -> None:
        from nemo_minitron.artifacts import Compensation, PrunePlan
        from nemo_minitron.hosts.nemo.models import load_model

        plan, (file, costs) = self.work / cut / "plan.json", self.fitted(cut, rows, passes)
        fitted = Compensation.load(file)
        student = load_model(self.model, PrunePlan.load(plan), compensation=fitted, precision=self.options.precision)[0]
        shares = next((value for name, value in fitted.notes.items() if name.startswith("held-out error")), {})
        row = {"cut": cut, "arm": f"{passes} passes", "seed": 0, "tokens": rows * 512, **self.losses(student)}
        self.results.add(row | {"costs": costs, "held-out error of each sub-block": shares})

    def fitted(self, cut: str, rows: int, passes: int) -> tuple[Path, dict[str, float]]:
        """(The file of a point's Compensation, what it cost.)"""
        self.make(cut, "slices")  # the scores and the plan
        file, plan = (self.work / cut / name for name in (f"{rows} rows {passes} passes.safetensors", "plan.json"))
        options = ["--data", texts.TRAIN, "--samples", rows, "--sequence-length", 512, "--batch-size", BATCH]
        options += ["--seed", SEED, "--reconstruct", passes]
        return file, self.once(file, lambda out: self.minitron("compensate", self.model, plan, *options, "--out", out))


def show(rows: list[dict[str, Any]]) -> None:
    """Losses, and the difference from the least squares of as many rows."""
    each = "loss of each row"
    for row in rows:
        base = next(
            (r for r in rows if (r["cut"], r["tokens"], r["arm"]) == (row["cut"], row["tokens"], "0 passes")), row
        )
        line = f"{row['cut']:12}{row['tokens']:>8,}  {row['arm']:12}"
        for name in texts.TEXTS:
            line += "{:>9.3f} {:>+8.3f} ({:.3f})".format(row[name], *compared(row[each], base[each], name))
        shares = [*row["held-out error of each sub-block"].values()]
        better = sum(share < 1 for share in shares)
        print(line, f"  {statistics.fmean(shares):.3f} of the error, {better} better" if shares else "")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default=str(common.MODEL))
    parser.add_argument("--work", type=Path, default=common.ROOT / "runs/quality", help="shared with quality.py")
    parser.add_argument("--novels", type=Path, help="the .deb of r-cran-janeaustenr; needed once")
    parser.add_argument("--cuts", nargs="+", default=["ffn 1024"], choices=list(CUTS))
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 16], help="of 512 calibration tokens")
    parser.add_argument("--passes", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--samples", type=int, default=16, help="rows of the selection")
    parser.add_argument("--sequence-length", type=int, default=512, help="of a row of the selection")
    parser.add_argument("--held-out", type=int, default=2048, help="tokens of each held-out text")
    parser.add_argument("--precision", default=best_precision(), choices=("fp32", "bf16"), help="of what is measured")
    parser.add_argument("--out", type=Path, default=common.dated("reconstruction"))
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    names = ("samples", "sequence_length", "held_out", "precision")
    results = Results(options.out, {name: getattr(options, name) for name in names} | {"calibration seed": SEED})
    Points(options, results).run()
    show(results.rows)


if __name__ == "__main__":
    main()
