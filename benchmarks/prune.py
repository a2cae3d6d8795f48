"""Compares `minitron prune`, folder to folder, with `cp`, on a synthetic Llama of several GB, in one run:
`python benchmarks/prune.py [--gigabytes 4] [--repeat 5] [--quick] [--folder /tmp]`.

For each plan it times the whole command `minitron prune`, with its start, in turn with the floor: a copy of the bytes
that it reads and writes. That is `cp` of a file as long as the student, and `dd` to /dev/null of the further bytes that
the cut reads (rows that stay are read completely, and columns are picked from them in memory). Every other round runs
in reverse order. On a file system that copies by reference (reflinks) `cp` is free and tells nothing: choose a
`--folder` on a file system without them, such as ext4.

"warm": teacher and student lie in the page cache, and written bytes may stay there. Before each run as many bytes are
written and deleted, because the host of a virtual machine takes free memory back, and its return costs up to three
times the copy itself. "cold": the files are dropped from the page cache before, and all are timed until everything is
on the disk (`sync`). Wall and processor seconds; they mean something on a machine that does nothing else. "start": the
same command on a model of some MB, that is, the time beside moving bytes (modules are compiled once, as pip does at an
installation). The peak is the resident memory of the command's process. Writes `benchmarks/results/DATE_prune.json`,
deletes the model.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.families import from_hf
from nemo_minitron.families.llama import Llama
from nemo_minitron.pruning.selection import student_index
from nemo_minitron.search import random_plan

LLAMA = {  # Llama-3.1-8B's layers under a smaller vocabulary, so that the largest tensor is an ordinary one
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
PICO = LLAMA | {"hidden_size": 256, "intermediate_size": 896, "head_dim": 8, "vocab_size": 2000}
SHARD, PIECE = 2_000_000_000, 4 << 20
PLANS = {  # shares of the 8B model; random units are the worst case for runs of neighbours
    "width": {"hidden": 0.75, "ffn": 9 / 14},
    "width, heads and depth": {"hidden": 0.75, "ffn": 9 / 14, "heads": 0.75, "layers": 0.8},
    "depth": {"layers": 0.6},
}
STATES = ("warm", "cold")
ALLOWED = 300_000_000  # bytes that are allowed beside three times the largest tensor


# -- the teacher ---------------------------------------------------------------------------------------
def make_teacher(folder: Path, config: dict[str, Any], size: int) -> int:
    """Random bf16 weights of at least `size` bytes, piece by piece; returns the number of layers."""
    shapes = Llama().architecture(config | {"num_hidden_layers": 1})
    outside = 2 * shapes.parameters(embeddings=True) - 2 * shapes.parameters(embeddings=False)
    layers = max(5, -(-(size - outside) // (2 * shapes.parameters(embeddings=False))))
    config = config | {"num_hidden_layers": layers}
    architecture = Llama().architecture(config)
    tensors = {name: architecture.shapes()[part] for name, (part,) in Llama().hf_tensors(architecture).items()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in tensors.items():
        if sum(map(_bytes, shards[-1].values())) + _bytes(shape) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    places = {}
    for number, members in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, members, number)
        places |= dict.fromkeys(members, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return layers


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape))


def _write_shard(file: Path, members: dict[str, tuple[int, ...]], seed: int) -> None:
    header, end = {}, 0
    for name, shape in members.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + _bytes(shape)]}
        end += _bytes(shape)
    text = json.dumps(header).encode()
    generator = np.random.default_rng(seed)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        while end:
            piece = min(end, PIECE)
            bits = np.frombuffer(generator.bytes(piece), np.uint16) & 0xBFFF  # below 2: a cut refuses infinities
            stream.write(bits.tobytes())
            end -= piece


# -- what is timed -------------------------------------------------------------------------------------
def bytes_of(plan: PrunePlan) -> tuple[int, int]:
    """(bytes of the rows that stay, bytes of the student)."""
    read = written = 0
    source = plan.source.shapes()
    for name, shape in plan.target.shapes().items():
        origin, index = student_index(plan, name)
        rows = len(index[0]) if len(index) > 1 else source[origin][0]  # vectors are read whole
        read += 2 * rows * int(np.prod(source[origin][1:]))
        written += _bytes(shape)
    return read, written


def cut(teacher: Path, plan: Path, out: Path) -> int:
    """Runs `minitron prune`; returns its peak resident bytes. Compiled modules are kept beside `plan`."""
    command = [sys.executable, "-m", "nemo_minitron.cli", "prune", str(teacher), str(plan), str(out)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(plan.parent / "compiled")
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    ) as process:  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(process.stderr.read().decode() if process.stderr else "minitron prune failed")
    return usage.ru_maxrss * 1024


def copy(student: Path, teacher: Path, more: int, out: Path) -> int:
    """`cp` of the student's bytes, and `more` bytes of the teacher read on top."""
    subprocess.run(["cp", "-r", str(student), str(out)], check=True)
    for file in sorted(teacher.glob("*.safetensors")):
        count = min(more, file.stat().st_size) >> 20
        subprocess.run(["dd", f"if={file}", "of=/dev/null", "bs=1M", f"count={count}", "status=none"], check=True)
        more -= count << 20
    return 0


def forget(*folders: Path) -> None:
    """Drops what is on the disk of these folders from the page cache."""
    os.sync()
    for file in (file for folder in folders for file in folder.iterdir()):
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(teacher: Path, student: Path, out: Path) -> None:
    """Both folders into the page cache, and as many pages as a student takes into the machine's free memory."""
    for file in (*teacher.iterdir(), *student.iterdir()):
        subprocess.run(["dd", f"if={file}", "of=/dev/null", "bs=1M", "status=none"], check=True)
    shutil.copytree(student, out)
    shutil.rmtree(out)


def timed(run: Any, out: Path, teacher: Path, student: Path, cold: bool) -> tuple[dict[str, float], int]:
    """Seconds by the wall and of the processor, user and system; peak resident bytes."""
    shutil.rmtree(out, ignore_errors=True)
    if cold:
        forget(teacher, student)
    else:
        remember(teacher, student, out)
    start, before = time.perf_counter(), _processor()
    peak = run(out)
    if cold:
        os.sync()
    wall, used = time.perf_counter() - start, _processor() - before
    return {"wall": round(wall, 3), "processor": round(used, 3)}, peak


def _processor() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(teacher: Path, plan: PrunePlan, work: Path, repeat: int) -> dict[str, Any]:
    plan.save(work / "plan.json")
    read, written = bytes_of(plan)
    student = work / "student"
    cut(teacher, work / "plan.json", student)
    runs = {
        "prune": lambda out: cut(teacher, work / "plan.json", out),
        "cp": lambda out: copy(student, teacher, max(0, read - written), out),
    }
    result: dict[str, Any] = {"gigabytes read": read / 1e9, "gigabytes written": written / 1e9}
    peaks = []
    for state in STATES:
        seconds: dict[str, dict[str, list[float]]] = {c: {n: [] for n in runs} for c in ("wall", "processor")}
        for round_ in range(repeat):
            for name in list(runs)[:: 1 if round_ % 2 else -1]:
                took, peak = timed(runs[name], work / "out", teacher, student, state == "cold")
                peaks.append(peak)
                for clock, value in took.items():
                    seconds[clock][name].append(value)
        result[state] = {clock: summary(of) for clock, of in seconds.items()}
    result["peak megabytes"] = max(peaks) / 1e6
    shutil.rmtree(student)
    return result


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """`prune` over `cp`: the median of the rounds' ratios, the least and most, and the ratio of the least seconds."""
    ratios = [a / b for a, b in zip(seconds["prune"], seconds["cp"], strict=True)]
    least = min(seconds["prune"]) / min(seconds["cp"])
    row = {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios), "of the least seconds": least}
    return {key: round(value, 3) for key, value in row.items()} | {"seconds": seconds}


def start(work: Path, repeat: int) -> dict[str, float]:
    """Medians of the seconds that a cut of a pico model takes."""
    teacher, student, out = work / "pico", work / "student", work / "out"
    make_teacher(teacher, PICO, 10_000_000)
    architecture = from_hf(teacher)
    random_plan(architecture, kept_sizes(PLANS["width"], architecture), seed=0).save(work / "plan.json")
    cut(teacher, work / "plan.json", student)
    runs = [timed(lambda to: cut(teacher, work / "plan.json", to), out, teacher, student, False) for _ in range(repeat)]
    shutil.rmtree(student)
    return {clock: statistics.median(took[clock] for took, _ in runs) for clock in ("wall", "processor")}


# -- all of it -----------------------------------------------------------------------------------------
def kept_sizes(shares: dict[str, float], architecture: Any) -> dict[str, int]:
    """Shares of the teacher's sizes -> sizes; heads stay a multiple of the groups."""
    sizes = {
        "hidden": architecture.hidden_size, "ffn": architecture.ffn_hidden_size,
        "heads": architecture.num_attention_heads, "layers": architecture.num_layers,
    }  # fmt: skip
    return {axis: round(share * sizes[axis]) for axis, share in shares.items()}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the teacher, at least")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a pico model, as a smoke test; writes no result")
    parser.add_argument("--folder", type=Path, help="folder for the model during the measurement")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        teacher = Path(folder) / "teacher"
        size = 10_000_000 if arguments.quick else int(arguments.gigabytes * 1e9)
        make_teacher(teacher, PICO if arguments.quick else LLAMA, size)
        result = everything(teacher, Path(folder), arguments.repeat)
    print(json.dumps(result, indent=1))
    if not arguments.quick:
        common.write(result, common.dated("prune"))


def everything(teacher: Path, work: Path, repeat: int) -> dict[str, Any]:
    architecture = from_hf(teacher)
    largest = max(map(_bytes, architecture.shapes().values()))
    result: dict[str, Any] = common.heading(("numpy",)) | {
        "teacher": {"gigabytes": 2 * architecture.parameters() / 1e9, "layers": architecture.num_layers},
        "allowed": {"ratio": 1.3, "peak megabytes": (3 * largest + ALLOWED) / 1e6},
        "start": start(work, repeat),
        "plans": {},
    }
    result["machine"]["real-time"] = os.sched_getscheduler(0) != os.SCHED_OTHER
    for name, shares in PLANS.items():
        keep = kept_sizes(shares, architecture)
        row = measure(teacher, random_plan(architecture, keep, seed=0), work, repeat)
        result["plans"][name] = {"keep": keep} | row
        for state in STATES:
            print(name, state, {k: v for k, v in row[state]["wall"].items() if k != "seconds"}, file=sys.stderr)
    return result


if __name__ == "__main__":
    main()
