"""Compares the scores of one process with those of three tensor-parallel ranks, on a real model:
`python benchmarks/layouts.py MODEL DATA [--samples 8]`. Prints the largest relative difference of each axis, and the
number of kept units that differ inside and outside twice the tolerance around their threshold.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from nemo_minitron.artifacts import Scores
from nemo_minitron.search import compare_plans, plan

TOLERANCE = 1e-5  # of fp32 calibration, whose sums run in another order
KEEP = {"ffn": 1024, "hidden": 448, "layers": 24}


def main(model: str, data: str, samples: str = "8") -> None:
    with tempfile.TemporaryDirectory() as folder:
        scores_by_tp = []
        for tp in ("1", "3"):
            out = Path(folder) / f"tp{tp}.safetensors"
            options = ["--data", data, "--samples", samples, "--sequence-length", "512", "--batch-size", "2"]
            options += ["--tp", tp, "--out", str(out)]
            subprocess.run([sys.executable, "-m", "nemo_minitron.cli", "estimate", model, *options], check=True)
            scores_by_tp.append(Scores.load(out))
    one, three = scores_by_tp
    for name, expected in one.tensors.items():
        difference = (np.abs(three[name] - expected) / np.abs(expected).max(axis=-1, keepdims=True)).max()
        print(f"{name:14}{difference:10.1e} of the row's largest")
    for axis, size in KEEP.items():
        plans = [plan(scores, keep={axis: size}) for scores in scores_by_tp]
        same, inside, outside = compare_plans(*plans, one, 2 * TOLERANCE)
        print(f"keep {axis}={size}: {'identical' if same else f'{inside} differ inside, {outside} outside'}")


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if argument != "--samples"])
