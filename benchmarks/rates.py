"""Learning rates for short runs: three cuts of SmolLM2-135M as a job cuts them, each distilled with some rates:
`python benchmarks/rates.py --novels r-cran-janeaustenr_1.0.0-1_all.deb --out RESULT.json`.

The students are those of `quality.py` (arm `job`), with its step, optimizer and texts, and with the same training rows
for every rate. The rate rises over two steps and falls to its tenth. Losses are nats a token on held-out Wikipedia, a
novel and Python's manual; the students train on Wikipedia's other articles. One row of `--train-length` tokens is a
step. The error of a difference is the standard error over the held-out rows. A finished run is written to `--out`; a
second start skips it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import common
import texts
from compensation_curve import compared
from quality import CUTS, JOB, SEED, Bench, Results
from short_training import Schedule

from nemo_minitron.settings.precision import best_precision

BASE = 3e-4  # the rate that `minitron compress MODEL` derives for a model of this size


class Sweep(Bench):
    """One run for each cut and rate; `seed` draws the rows."""

    def run(self) -> None:
        from nemo_minitron.distillation.teacher import Teacher
        from nemo_minitron.hosts.nemo.distill import model_inputs
        from nemo_minitron.hosts.nemo.models import load_model

        o, teacher = self.options, Teacher(load_model(self.model, precision=self.options.precision)[:1], model_inputs)
        for cut in o.cuts:
            for rate in [0.0, *o.rates]:
                arm, seed, tokens = f"rate {rate:g}", o.seed if rate else 0, o.tokens if rate else 0
                if self.results.find(cut, arm, seed, tokens):
                    continue
                plan, compensation, _ = self.make(cut, JOB)
                student = load_model(self.model, plan, compensation=compensation, precision=o.precision)[0]
                self.schedule = Schedule(peak=rate, least=rate / 10)
                more = self.train(student, teacher, seed) if rate else {}
                row = {"cut": cut, "arm": arm, "seed": seed, "tokens": tokens}
                self.results.add({**row, **self.losses(student), **more})


def show(rows: list[dict[str, Any]]) -> None:
    """Losses, and the difference from the base rate where it was run."""
    for row in rows:
        base = next((r for r in rows if (r["cut"], r["arm"]) == (row["cut"], f"rate {BASE:g}")), row)
        each = "loss of each row"
        line = f"{row['cut']:14}{row['arm']:14}{row['tokens']:>8,}"
        for name in texts.TEXTS:
            difference, error = compared(row[each], base[each], name)
            line += f"{row[name]:>10.3f} {difference:>+8.3f} ({error:.3f})"
        print(line)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default=str(common.MODEL))
    parser.add_argument("--work", type=Path, default=common.ROOT / "runs/quality", help="shared with quality.py")
    parser.add_argument("--novels", type=Path, help="the .deb of r-cran-janeaustenr; needed once")
    parser.add_argument("--samples", type=int, default=16, help="calibration rows")
    parser.add_argument("--sequence-length", type=int, default=512, help="of a calibration row")
    parser.add_argument("--held-out", type=int, default=4096, help="tokens of each held-out text")
    parser.add_argument("--tokens", type=int, default=16384, help="that each student is trained on")
    parser.add_argument("--train-length", type=int, default=256, help="of a training row")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.5e-4, BASE, 6e-4])
    parser.add_argument("--seed", type=int, default=1, help="of the training rows")
    parser.add_argument("--precision", default=best_precision(), choices=("fp32", "bf16"), help="of what is measured")
    parser.add_argument("--cuts", nargs="+", default=["ffn 1024", "layers 24", "all, to 84M"], choices=list(CUTS))
    parser.add_argument("--out", type=Path, default=common.dated("rates"))
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    names = ("samples", "sequence_length", "held_out", "train_length", "precision")
    settings = {name: getattr(options, name) for name in names} | {"calibration seed": SEED}
    settings |= {"schedule": dataclasses.asdict(Schedule()) | {"peak": "rate", "least": "rate / 10"}}
    results = Results(options.out, settings)
    Sweep(options, results).run()
    show(results.rows)


if __name__ == "__main__":
    main()
