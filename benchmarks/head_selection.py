"""Which query heads stay after a cut: by scores, or by the error that is left after the re-fit. SmolLM2-135M, heads
9 -> 6 and 9 -> 3, as cut: `python benchmarks/head_selection.py --novels r-cran-janeaustenr_1.0.0-1_all.deb --out
RESULT.json`.

Arms: `heads` (the norm over a head's channels of each token, a job's default), `channels` (the norm over the channels'
mean |activation|, Model Optimizer's rule), and `least error`: of all ways to keep as many heads in each query group,
the one whose least squares leave the least error of the attention's output, from the Gram matrix that the re-fit uses.
Each is measured as plain slices, and with the output matrix re-fitted. All read the same calibration rows of Wikipedia.
Losses are nats a token on held-out Wikipedia, a novel and Python's manual (`texts.py`); the error of a difference from
`heads` is the standard error over the held-out rows.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import texts
from compensation_curve import LENGTH, Bench, compared

BASE, CHANNELS, LEAST = "heads", "channels", "least error"


class Selection(Bench):
    """The teacher, its scores, and the Gram matrices of the attention's outputs."""

    def __init__(self, options: Any) -> None:
        from nemo_minitron.importance import estimate
        from nemo_minitron.importance.gram import gram
        from nemo_minitron.search import plan

        super().__init__(options)
        a = self.source.architecture
        batches = self.calibration.split(4)
        scores = estimate(self.teacher, batches, axes=("heads", "head_channels"), architecture=a)
        channels = scores["head_channels"].astype(np.float64).reshape(a.num_layers, a.num_attention_heads, a.head_dim)
        grams = gram(self.teacher, batches, kinds=("o",))
        self.gram = {int(name.split(".")[1]): sums.numpy() for name, sums in grams.items()}
        self.weights = {int(name.split(".")[1]): self.whole(name) for name in grams}
        self.by = {BASE: scores["heads"], CHANNELS: np.linalg.norm(channels, axis=-1)}
        self.first = {size: plan(scores, {"heads": size}) for size in options.heads}

    def whole(self, name: str) -> np.ndarray:
        """A tensor of the teacher, float64."""
        from nemo_minitron.artifacts.dtypes import as_numbers

        index = tuple(map(np.arange, self.source.architecture.shapes()[name]))
        return as_numbers(self.source.read(name, index), self.source.dtype(name))

    def kept(self, arm: str, size: int) -> dict[int, list[int]]:
        """Layer -> the heads that stay, rising."""
        a = self.source.architecture
        of_group, keep = a.heads_per_group, size // a.num_query_groups
        if arm != LEAST:
            ranked = np.argsort(-self.by[arm].reshape(a.num_layers, -1, of_group), axis=-1, kind="stable")[..., :keep]
            at = np.sort(ranked + np.arange(0, a.num_attention_heads, of_group)[:, None], axis=-1)
            return {layer: heads.ravel().tolist() for layer, heads in enumerate(at)}
        groups = [range(start, start + of_group) for start in range(0, a.num_attention_heads, of_group)]
        ways = [sum(way, ()) for way in itertools.product(*(itertools.combinations(g, keep) for g in groups))]
        return {layer: list(min(ways, key=lambda way: self.error(layer, way))) for layer in range(a.num_layers)}

    def error(self, layer: int, heads: tuple[int, ...]) -> float:
        """The squared error of the re-fitted output over the calibration's tokens, before the ridge's pull."""
        from nemo_minitron.pruning.defaults import RIDGE

        size, gram = self.source.architecture.head_dim, self.gram[layer]
        kept = np.concatenate([np.arange(h * size, (h + 1) * size) for h in heads])
        gone = np.setdiff1d(np.arange(len(gram)), kept)
        solid = gram[np.ix_(kept, kept)] + RIDGE * np.trace(gram[np.ix_(kept, kept)]) / len(kept) * np.eye(len(kept))
        left = gram[np.ix_(gone, gone)] - gram[np.ix_(gone, kept)] @ np.linalg.solve(solid, gram[np.ix_(kept, gone)])
        weight = self.weights[layer][:, gone]
        return float(np.einsum("og,gh,oh->", weight, left, weight))

    def students(self) -> Iterator[tuple[int, str, int, dict[str, Any]]]:
        """(Size, arm, heads that differ from the first arm's, {"slices" and "re-fitted": losses})."""
        import dataclasses

        from nemo_minitron.pruning.compensation import solvable, solve

        for size, base in self.first.items():
            for arm in (BASE, CHANNELS, LEAST):
                self.plan = dataclasses.replace(base, keep=base.keep | {"heads": self.kept(arm, size)})
                pairs = zip(self.plan.keep["heads"].values(), base.keep["heads"].values(), strict=True)
                others = sum(len(set(mine) - set(theirs)) for mine, theirs in pairs)
                tensors = {
                    name: solve(self.source, self.plan, name, self.gram[int(origin.split(".")[1])])
                    for name, origin in solvable(self.plan)
                }
                yield size, arm, others, {"slices": self.student({}), "re-fitted": self.student(tensors)}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default=str(common.MODEL))
    parser.add_argument("--work", type=Path, default=common.ROOT / "runs/compensation_curve")
    parser.add_argument("--novels", type=Path, help="the .deb of r-cran-janeaustenr; needed once")
    parser.add_argument("--rows", type=int, nargs=1, default=[16], help=f"of {LENGTH} calibration tokens")
    parser.add_argument("--heads", type=int, nargs="+", default=[6, 3], help="that stay")
    parser.add_argument("--tokens", type=int, default=4096, help="of each held-out text")
    parser.add_argument("--texts", nargs="+", default=list(texts.TEXTS), choices=texts.TEXTS)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of what is measured")
    parser.add_argument("--out", type=Path, default=common.dated("head_selection"))
    options = parser.parse_args()
    options.cuts = ["heads"]
    import torch

    torch.set_num_threads(1)
    result, rows, first = common.heading(("torch", "numpy", "megatron-core")), [], {}
    settings = {"calibration tokens": options.rows[0] * LENGTH, "held-out tokens": options.tokens}
    settings["precision"] = options.precision
    for size, arm, others, made in Selection(options).students():
        for name, losses in made.items():
            base = first.setdefault((size, name), losses)
            row = {"heads": size, "selection": arm, "other heads": others, "cut": name}
            row |= {text: round(statistics.fmean(each), 4) for text, each in losses.items()}
            rows.append(row | {"difference": {text: compared(losses, base, text) for text in losses}})
            print(rows[-1], flush=True)
            common.write({**result, "settings": settings, "rows": rows}, options.out)


if __name__ == "__main__":
    main()
