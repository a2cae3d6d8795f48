"""Distils the same student on NeMo 2 and on Megatron-Bridge, and compares the losses and the time of a step.

The student is SmolLM2-135M with 1,024 of its 1,536 neurons, by one cut for both hosts. A seed is the order of the rows.

    .venv/bin/python benchmarks/hosts_training.py --bridge .venv-bridge/bin/python --tokens 60k --seeds 1 2 3
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from nemo_minitron.settings.numbers import whole_number

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "demo" / "smollm2-135m-instruct"
TRAIN, TEST = (ROOT / "demo" / "wikipedia" / f"{split}.jsonl" for split in ("train", "test"))
LENGTH, ROWS = 256, 4  # of a row, and of a step


def minitron(python: str, folder: Path, *words: object) -> None:
    """Runs a command of this package, and shows its output if it fails."""
    command = [python, "-m", "nemo_minitron", *map(str, words)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def cut(python: str, folder: Path) -> None:
    rows = ("--samples", 32, "--sequence-length", LENGTH, "--precision", "fp32")
    minitron(python, folder, "estimate", TEACHER, "--data", TRAIN, "--out", "scores.safetensors", *rows)
    minitron(python, folder, "plan", "scores.safetensors", "--keep", "ffn=1024", "--out", "plan.json")
    minitron(python, folder, "prune", TEACHER, "plan.json", "student")


def distilled(python: str, folder: Path, name: str, seed: int, tokens: int) -> tuple[list[float], float, float]:
    """The losses of all steps, the last held-out loss, and the median seconds of a step after the first five."""
    steps = ("--sequence-length", LENGTH, "--global-batch-size", ROWS, "--precision", "fp32", "--seed", seed)
    every = max(5, tokens // (LENGTH * ROWS) // 3)
    held_out = ("--validation", TEST, "--validate-every", every, "--validation-batches", 4)
    minitron(
        python, folder, "distill", "student", "--teacher", TEACHER, "--data", TRAIN, "--out", name, "--tokens", tokens,
        *steps, *held_out,
    )  # fmt: skip
    rows = list(csv.DictReader((folder / name / "loss.csv").open()))
    seconds = [float(row["seconds"]) for row in rows]
    each = [after - before for before, after in itertools.pairwise(seconds[4:])]
    validations = list(csv.DictReader((folder / name / "validation.csv").open()))
    return [float(row["loss"]) for row in rows], float(validations[-1]["loss"]), statistics.median(each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bridge", required=True, help="Python of an environment with Megatron-Bridge")
    parser.add_argument("--tokens", type=whole_number, default=60_000, help="of a training, for example 60k")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    bridge = str(Path(options.bridge).absolute())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cut(sys.executable, folder)
        print("seed  step 1: NeMo, Bridge  losses apart  held out: NeMo, Bridge  seconds a step: NeMo, Bridge (ratio)")
        for seed in options.seeds:
            nemo = distilled(sys.executable, folder, f"nemo-{seed}", seed, options.tokens)
            other = distilled(bridge, folder, f"bridge-{seed}", seed, options.tokens)
            apart = max(abs(a - b) for a, b in zip(nemo[0], other[0], strict=True))
            print(
                f"{seed:4}  {nemo[0][0]:.6f} {other[0][0]:.6f}  {apart:.1e}  {nemo[1]:.6f} {other[1]:.6f}  "
                f"{nemo[2]:.2f} {other[2]:.2f} ({other[2] / nemo[2]:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
