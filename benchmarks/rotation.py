"""What a rotation of the residual stream gains before a cut of hidden channels: SmolLM2-135M, as cut: `python
benchmarks/rotation.py --novels r-cran-janeaustenr_1.0.0-1_all.deb --out RESULT.json`.

Arms: `channels` (the best channels by score, norms folded: a job's default), and `band B` (the first axes of the
rotated teacher, norms folded): channels share axes if the final norm's weights are within B of the median, because the
output head is the embedding. All read the same calibration rows of Wikipedia.
Losses are nats a token on held-out Wikipedia, a novel and Python's manual (`texts.py`); a difference is to `channels`,
its error the standard error over the held-out rows. A finished row is written to `--out`; a second start skips it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
import texts
from compensation_curve import compared
from quality import SEED, Bench, Results

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.pruning.rotation import BAND

CHANNELS = "channels"


class Rotations(Bench):
    def run(self) -> None:
        from nemo_minitron.hosts.nemo.models import load_model
        from nemo_minitron.importance import estimate
        from nemo_minitron.importance.stream import stream_covariance
        from nemo_minitron.search import plan

        teacher, a = load_model(self.model, precision="fp32"), self.source.architecture
        batches = self.calibration.split(4)
        self.measured("none", "teacher", self.model, None)
        scores = estimate(teacher, batches, axes=("norms",), architecture=a)
        covariance = stream_covariance(teacher, batches, a).numpy()
        del teacher
        for size in self.options.hidden:
            target = a.replace(hidden_size=size)
            self.measured(f"hidden {size}", CHANNELS, self.model, plan(scores, {"hidden": size}))
            for band in self.options.bands if size == self.options.hidden[0] else [BAND]:
                folder, first = self.rotated(covariance, band), PrunePlan(a, target, {"hidden": list(range(size))})
                self.measured("none", f"band {band}", folder, None)
                self.measured(f"hidden {size}", f"band {band}", folder, first)

    def rotated(self, covariance: Any, band: float) -> str:
        from nemo_minitron.commands.rotate import write_rotated
        from nemo_minitron.pruning.rotation import rotation_of

        folder = self.work / f"rotated in a band of {band}"
        if not folder.exists():
            rotation = rotation_of(self.source, covariance, band)
            write_rotated(self.source, rotation, folder, {"band": band})
        return str(folder)

    def measured(self, cut: str, arm: str, model: str, plan: PrunePlan | None) -> None:
        from nemo_minitron.commands.prune import Extras, compensation_of
        from nemo_minitron.hosts.nemo.models import load_model
        from nemo_minitron.sources.open import open_source

        if self.results.find(cut, arm, 0, 0):
            return
        folded = compensation_of(open_source(model), plan, Extras(fold_norms=True)) if plan else None
        chunk = load_model(model, plan, compensation=folded, precision=self.options.precision)[0]
        self.results.add({"cut": cut, "arm": arm, "seed": 0, "tokens": 0, **self.losses(chunk)})


def show(rows: list[dict[str, Any]]) -> None:
    """Losses, and the difference from the best channels; of uncut models from the teacher."""
    each = "loss of each row"
    for row in rows:
        base = next(r for r in rows if r["cut"] == row["cut"] and r["arm"] in (CHANNELS, "teacher"))
        line = f"{row['cut']:12}{row['arm']:12}{row['parameters']:>13,}"
        for name in texts.TEXTS:
            difference, error = compared(row[each], base[each], name)
            line += f"{row[name]:>10.3f} {difference:>+8.3f} ({error:.3f})"
        print(line)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default=str(common.MODEL))
    parser.add_argument("--work", type=Path, default=common.ROOT / "runs/rotation")
    parser.add_argument("--novels", type=Path, help="the .deb of r-cran-janeaustenr; needed once")
    parser.add_argument("--samples", type=int, default=32, help="calibration rows")
    parser.add_argument("--sequence-length", type=int, default=512, help="of a calibration row")
    parser.add_argument("--held-out", type=int, default=4096, help="tokens of each held-out text")
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 448, 384], help="channels that stay")
    parser.add_argument("--bands", type=float, nargs="+", default=[0.05, BAND, 0.2], help="at the first size")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of what is measured")
    parser.add_argument("--out", type=Path, default=common.dated("rotation"))
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    names = ("samples", "sequence_length", "held_out", "precision")
    settings = {name: getattr(options, name) for name in names} | {"calibration seed": SEED}
    results = Results(options.out, settings)
    Rotations(options, results).run()
    show(results.rows)


if __name__ == "__main__":
    main()
