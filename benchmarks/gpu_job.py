"""A whole job on one GPU, killed and resumed: `python benchmarks/gpu_job.py --precision bf16`.

It compresses a model with `minitron compress`, sends SIGTERM once some steps are trained, and runs the command again,
which must go on from the checkpoint. Then it compares the losses with those of a job that was not killed, measures the
student in transformers, and reads the trained checkpoint in a process that sees no GPU (so without Transformer Engine):
its weights, in the student's dtype, must be the student's, bit by bit. The model is the demo's, or with
`--shape Llama-3.2-1B` a random one with the demo's tokenizer. The JSON is written after each piece. `--device cpu
--quick` does it at pico size, without gates, re-fit and random cut.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import common
from gpu_steps import PICO, SHAPES, config_of
from random_folder import random_folder

from nemo_minitron.artifacts.run_folder import RunFolder, TrainingFolder


class Pace(NamedTuple):
    """Tokens of a row, steps of the training, steps between two checkpoints, and steps before the signal is sent."""

    length: int
    steps: int
    save: int
    kill: int


WHOLE, QUICK = Pace(1024, 24, 6, 10), Pace(64, 9, 3, 4)


def random_model(name: str, folder: Path, device: str) -> Path:
    """A random model of a shape, in bf16, with the demo's tokenizer."""
    from nemo_minitron.data import load_tokenizer

    extra, teacher, _ = (PICO | SHAPES)[name]
    return random_folder(folder, config_of(teacher, extra, len(load_tokenizer(str(common.MODEL)))), device)


def some_text(folder: Path, share: float) -> Path:
    """The beginning of each of the demo's documents. All of it takes 15 seconds to tokenise, in each of the runs; and
    every 20th document is held out, so fewer documents would not do."""
    rows = [json.loads(line) for line in (common.TEXT / "train.jsonl").read_text().splitlines()]
    shorter = [row | {"text": row["text"][: round(share * len(row["text"]))]} for row in rows]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shorter))
    return folder / "text.jsonl"


def command(model: Path, text: Path, out: Path, precision: str, pace: Pace) -> list[str]:
    ffn = json.loads((model / "config.json").read_text())["intermediate_size"] * 2 // 3 // 32 * 32
    given = [f"--data={text}", f"--keep=ffn={ffn}", f"--out={out}"]
    length = pace.length
    settings = {
        "calibration.samples": 16, "calibration.sequence_length": length, "distillation.sequence_length": length,
        "distillation.global_batch_size": 1, "distillation.tokens": pace.steps * length,
        "distillation.save_every": pace.save,
        "distillation.precision": precision, "evaluation.tokens": 8 * length, "evaluation.sequence_length": length,
        "evaluation.prompts": "[]",
    }  # fmt: skip
    if pace is QUICK:  # other tests run these
        settings |= dict.fromkeys(("gates.run", "cutting.compensate", "evaluation.random_baseline"), "false")
    chosen = [f"{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "nemo_minitron.cli", "compress", str(model), *given, *chosen]


def losses(out: Path) -> list[float]:
    """The losses that a run's training has written so far."""
    file = TrainingFolder(RunFolder(out).distilled).losses
    if not file.exists():
        return []
    with file.open() as rows:
        return [float(row["loss"]) for row in csv.DictReader(rows)]


def killed(words: list[str], out: Path, log: Path, steps: int) -> int:
    """Runs the job until so many steps are trained, then sends SIGTERM. Returns the number of steps it had trained."""
    with log.open("w") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and len(losses(out)) < steps:
                time.sleep(0.05)
        finally:  # whatever goes wrong here, nothing writes into the folder after this
            process.send_signal(signal.SIGTERM)
            process.wait()
    return len(losses(out))


def ran(words: list[str], log: Path) -> float:
    """Runs a command to its end and returns its seconds; ends this script with its output if it fails."""
    began = time.perf_counter()
    with log.open("w") as stream:
        code = subprocess.run(words, stdout=stream, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(log.read_text()[-4000:])
    return time.perf_counter() - began


def read_without_engine(out: Path, folder: Path) -> bool:
    """Whether the trained checkpoint, converted where no GPU is seen, has the student's bits."""
    from safetensors import safe_open

    training = RunFolder(out).distilled
    saved = [*training.rglob("*-last"), *training.rglob("iter_*")]  # NeMo's, Megatron-Bridge's
    checkpoint = max((folder for folder in saved if folder.is_dir()), key=lambda folder: folder.stat().st_mtime)
    words = [sys.executable, "-m", "nemo_minitron.cli", "convert", str(checkpoint), str(folder)]
    subprocess.run(words, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True)

    def tensors(place: Path) -> dict[str, Any]:
        files = [safe_open(file, "pt") for file in place.glob("*.safetensors")]
        return {name: file.get_tensor(name) for file in files for name in file.keys()}  # noqa: SIM118

    ours, theirs = tensors(folder), tensors(out / "student")
    same = [bool((ours[name].to(bits.dtype) == bits).all()) for name, bits in theirs.items() if name in ours]
    return ours.keys() == theirs.keys() and all(same)


def run(
    model: Path, precision: str, pace: Pace, folder: Path, note: Callable[[dict[str, Any]], object]
) -> None:  # fmt: skip
    """The job at once, the job with a kill, and what is read from both; `note` gets each piece that was found."""
    once, twice, text = folder / "once", folder / "twice", some_text(folder, max(1 / 16, pace.length / 2048))
    words = command(model, text, twice, precision, pace)
    seconds = ran(command(model, text, once, precision, pace), folder / "once.log")
    whole, stages = losses(once), json.loads((once / "manifest.json").read_text())["stages"]
    note({"precision": precision, "steps": len(whole), "first loss": whole[0], "last loss": whole[-1]})
    numbers = json.loads((once / "numbers.json").read_text())
    note({"seconds": round(seconds, 1), "loss in transformers": {row["stage"]: row["loss"] for row in numbers}})
    note({"seconds of stages": {stage["name"]: stage["seconds"] for stage in stages}})
    note({"killed after step": killed(words, twice, folder / "killed.log", pace.kill)})
    again = ran(words, folder / "resumed.log")
    apart = max(abs(a - b) for a, b in zip(whole, losses(twice), strict=True))
    note({"seconds of the resumed": round(again, 1), "largest difference after a kill and a resume": apart})
    note({"read without Transformer Engine, bit by bit": read_without_engine(once, folder / "converted")})


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--shape", default="", choices=["", *PICO, *SHAPES], help="a random model of this shape")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="pico size")
    parser.add_argument("--out", type=Path, help="the JSON; default: none is written")
    given = parser.parse_args()
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU; --device cpu --quick runs the job at pico size")
    result = common.heading(["torch", "transformer-engine", "megatron-core"]) | {"found": {}}

    def note(piece: dict[str, Any]) -> None:
        result["found"] |= piece
        common.write(result, given.out)
        print(json.dumps(piece), flush=True)

    folder = Path(tempfile.mkdtemp())
    try:
        shape = "pico" if given.quick else given.shape
        model = random_model(shape, folder / "model", given.device) if shape else common.MODEL
        run(model, given.precision, QUICK if given.quick else WHOLE, folder, note)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
