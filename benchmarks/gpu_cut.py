"""What a user waits for and rents, from a Hugging Face folder to scores, plan and student, beside the dry run:

    python benchmarks/gpu_cut.py --shape Llama-3.1-8B
    python benchmarks/gpu_cut.py --shape Llama-3.1-70B --layers 6     # what fits on one GPU and its disk
    python benchmarks/gpu_cut.py --device cpu --quick                 # pico size; its numbers mean nothing

A random model of the shape is written first (that is not counted). Then it runs `minitron compress --dry-run`,
`estimate`, `plan` and `prune`, one after the other, as a user does. For each command: seconds by the wall from start to
end, and two peaks: the GPU's memory beyond what was taken before (sampled every 20 ms; with the CUDA context and the
allocator's slack), and the resident memory of the largest process.

Beside them stand what the dry run says: parameters, bytes in bf16, and of scoring the memory (`job/scoring.py`) and the
FLOPs at its speed and MFU. The memory of a training step stands beside the dry run's in the steps of `gpu.py`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
from gpu_steps import LARGE, PICO, SHAPES, config_of
from random_folder import random_folder

ALL = PICO | SHAPES | LARGE
VOCAB, ROWS, LENGTH = 128_256, 32, 4096
PICO_VOCAB, PICO_LENGTH = 49_152, 64  # the demo's tokenizer has so many tokens
# Linux counts a process's memory from its fork on, so a small process starts the command: this one holds torch.
WATCH = """
import os, sys
process = os.spawnv(os.P_NOWAIT, sys.argv[2], sys.argv[2:])
_, status, used = os.wait4(process, 0)
with open(sys.argv[1], "w") as file:
    file.write(str(used.ru_maxrss))  # of the process and those that it started, the largest
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


class Peak:
    """The most memory of the GPU that is taken between enter and exit, beyond what was taken before; None on a CPU."""

    def __init__(self, device: str) -> None:
        self.device, self.most, self.before = device, 0, 0
        self.ended = threading.Event()

    def taken(self) -> int:
        import torch

        free, total = torch.cuda.mem_get_info()
        return total - free

    def __enter__(self) -> Peak:
        if self.device == "cuda":
            self.before = self.most = self.taken()
            self.thread = threading.Thread(target=self.watch)
            self.thread.start()
        return self

    def watch(self) -> None:
        while not self.ended.wait(0.02):
            self.most = max(self.most, self.taken())

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        if self.device == "cuda":
            self.thread.join()

    @property
    def bytes(self) -> int | None:
        return self.most - self.before if self.device == "cuda" else None


def command(device: str, *words: str) -> dict[str, Any]:
    """Runs `minitron WORDS`: its seconds and peaks. Ends this script with its output if it fails."""
    with tempfile.NamedTemporaryFile("w+") as log, tempfile.NamedTemporaryFile("r") as memory, Peak(device) as peak:
        began, line = time.perf_counter(), [sys.executable, "-m", "nemo_minitron.cli", *words]
        watched = [sys.executable, "-S", "-c", WATCH, memory.name, *line]
        code = subprocess.run(watched, stdout=log, stderr=subprocess.STDOUT).returncode
        seconds = time.perf_counter() - began
        if code:
            raise SystemExit(f"minitron {words[0]} failed:\n{Path(log.name).read_text()[-3000:]}")
        resident = int(memory.read()) * 1024
    return {"s": round(seconds, 1), "bytes of the GPU": peak.bytes, "bytes resident": resident}


def size(folder: Path) -> dict[str, int]:
    """What the dry run says of a model, and what lies on the disk."""
    from nemo_minitron.families import from_hf

    architecture = from_hf(folder)
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    said = architecture.memory(batch=1, context=0)
    return {"parameters": architecture.parameters(), "bytes in the dry run": said, "bytes on disk": on_disk}


def run(model: Path, device: str, keep: str, length: int, save: Callable[[dict[str, Any]], object]) -> None:
    """All commands; `save` gets what was found so far after each."""
    work, data = model.parent, str(common.TEXT / "train.jsonl")
    scores, plan, student = (str(work / name) for name in ("scores.safetensors", "plan.json", "student"))
    sizes = [f"--samples={ROWS}", f"--sequence-length={length}", "--precision=bf16"]
    commands = {
        "dry run": ("compress", str(model), f"--data={data}", f"--keep={keep}", "--dry-run"),
        "estimate": ("estimate", str(model), f"--data={data}", f"--out={scores}", *sizes),
        "plan": ("plan", scores, f"--keep={keep}", f"--out={plan}"),
        "prune": ("prune", str(model), plan, student),
    }
    found: dict[str, Any] = {"scored": f"{ROWS} rows of {length} tokens", "teacher": size(model)}
    for name, words in commands.items():
        found[name] = command(device, *words)
        save(found)
    found["student"] = size(Path(student))
    found["all but the dry run, minutes"] = sum(found[name]["s"] for name in ("estimate", "plan", "prune")) / 60
    save(found | {"measured over the dry run": compared(found, model, length)})


def compared(found: dict[str, Any], model: Path, length: int) -> dict[str, Any]:
    from nemo_minitron.families import from_hf
    from nemo_minitron.job import Calibration, Layout
    from nemo_minitron.job.compute import MFU
    from nemo_minitron.job.scoring import Refit, scoring_flops, scoring_memory, seconds_of

    source, settings = from_hf(model), Calibration(samples=ROWS, sequence_length=length, precision="bf16")
    row = {
        f"{name}, bytes on disk": found[name]["bytes on disk"] / found[name]["bytes in the dry run"]
        for name in ("teacher", "student")
    }
    seconds = seconds_of(scoring_flops(source, settings, Refit()))
    row[f"estimate, s over its FLOPs at an MFU of {MFU:.0%}"] = found["estimate"]["s"] / seconds
    if (peak := found["estimate"]["bytes of the GPU"]) is not None:
        row["estimate, bytes of the GPU"] = peak / sum(scoring_memory(source, settings, Layout()).values())
    return row


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--shape", default="Llama-3.2-1B", choices=ALL, help="of the random model")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="pico size")
    parser.add_argument("--out", type=Path, help="the JSON; default: none is written")
    given = parser.parse_args()
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU; --device cpu --quick runs the commands at pico size")
    vocab, length = (PICO_VOCAB, PICO_LENGTH) if given.quick else (VOCAB, LENGTH)
    name = "pico" if given.quick else given.shape
    extra, teacher, student = ALL[name]
    config = config_of(teacher, extra, vocab, given.layers)
    result = common.heading(["torch", "transformer-engine", "megatron-core"])

    def save(found: dict[str, Any]) -> None:
        common.write(result | {"found": {"shape": name, "layers": config["num_hidden_layers"]} | found}, given.out)
        *_, (last, value) = found.items()
        print(f"{last}: {json.dumps(value)}", flush=True)

    folder = Path(tempfile.mkdtemp())
    try:
        began = time.perf_counter()
        model = random_folder(folder / "model", config, given.device)
        print(f"a random {name} was written in {time.perf_counter() - began:.0f} s", flush=True)
        torch.cuda.empty_cache()
        run(model, given.device, f"hidden={student[0]},ffn={student[1]}", length, save)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
