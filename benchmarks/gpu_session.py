"""All that one Hopper can show in half an hour, in the order of its value, in calls of under ten minutes:

    python benchmarks/gpu_session.py                         # a second call goes on where the first ended
    python benchmarks/gpu_session.py --device cpu --quick    # every part at pico sizes; its numbers mean nothing
    python benchmarks/gpu_session.py --show                  # what was found so far; runs nothing
    python benchmarks/gpu_session.py --list                  # the parts and their limits

Each part is a process of its own under a time limit: whole jobs (`gpu_job.py`), `tests/gpu`, times of steps, scoring
and losses (`gpu.py`), the commands from a folder to a student (`gpu_cut.py`), launch settings (`gpu_kernels.py`). A
part begins only if half of its limit is left of the call. A second call first runs what was not tried, then what
failed; what is done is not run again, unless `--redo` names it.

`benchmarks/results/DATE_gpu_session.json` is written before and after each part: for each its state (also "not run",
with the reason), its seconds, its numbers, and the end of its output. The call ends with a summary of it. The jobs need
the demo's files and `pip install -e .`; `gpu_pack.py` packs what a machine without a package index needs.

On a CPU the limits are four times as long and the call has no end, because nobody rents it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from gpu_summary import BEGUN, DONE, FAILED, LATE, NOT_RUN, summary

PACKAGES = ["torch", "megatron-core", "nemo_toolkit", "transformer-engine", "triton", "nvidia-modelopt", "liger-kernel"]
LEAST = 20  # seconds that must be left for a part to begin
CALL = 570  # seconds of a call on a GPU
LONGER = {"cuda": 1, "cpu": 4}  # times the limit
ABSENT = {"teacher ahead on a second stream": "the package has no such teacher, so there is nothing to measure"}


@dataclasses.dataclass(frozen=True)
class Part:
    """A script of `benchmarks/` or a module with its arguments. `limit`: seconds. `anywhere`: it runs without a GPU."""

    name: str
    words: tuple[str, ...]
    limit: int
    anywhere: bool = True

    def command(self, device: str, quick: bool, out: Path) -> list[str]:
        if self.words[0] == "-m":
            return [sys.executable, *self.words]
        script, *words = self.words
        sizes = ["--quick"] * quick if self.anywhere else []
        given = ["--device", device, *sizes, "--out", str(out)] if self.anywhere else []
        return [sys.executable, str(common.ROOT / "benchmarks" / script), *words, *given]

    def why_not(self, device: str, quick: bool) -> str:
        """Why it is left out; empty if it is not."""
        if device == "cpu" and not self.anywhere:
            return "it needs a GPU"
        if (quick or device == "cpu") and "Llama" in " ".join(self.words):
            return "its shape is no pico size" if quick else "its shape is too large for a CPU"
        return ""

    def least(self, quick: bool) -> float:
        """Seconds that must be left of a call."""
        return LEAST if quick else max(LEAST, self.limit / 2)


def cut_of(shape: str, *words: str) -> tuple[str, ...]:
    return ("gpu_cut.py", "--shape", shape, *words)


PARTS = (
    Part("job in bf16", ("gpu_job.py", "--precision", "bf16"), 240),
    Part("job in FP8", ("gpu_job.py", "--precision", "fp8-current"), 240),
    Part("job of a 1B in FP8", ("gpu_job.py", "--shape", "Llama-3.2-1B", "--precision", "fp8-current"), 300),
    Part("suite", ("-m", "pytest", str(common.ROOT / "tests" / "gpu"), "-q", "-rs"), 280, anywhere=False),
    Part("steps of the 8B pair", ("gpu.py", "--only", "step: Llama-3.1-8B"), 240),
    Part("steps of the 1B pair", ("gpu.py", "--only", "step: Llama-3.2-1B"), 180),
    Part("steps", ("gpu.py", "--only", "step: pico"), 180),
    Part("scoring", ("gpu.py", "--only", "importance"), 90),
    Part("losses and fused head", ("gpu.py", "--only", "loss"), 120),
    Part("teacher in the CPU's memory", ("gpu.py", "--only", "teacher"), 150),
    Part("folder to student, pico", ("gpu_cut.py",), 120),
    Part("folder to student, 1B", cut_of("Llama-3.2-1B"), 120),
    Part("folder to student, 8B", cut_of("Llama-3.1-8B"), 240),
    Part("folder to student, layers of a 70B", cut_of("Llama-3.1-70B", "--layers", "6"), 240),
    Part("kernels' settings", ("gpu_kernels.py",), 120, anywhere=False),
)


def run(part: Part, device: str, quick: bool, seconds: float) -> dict[str, Any]:
    """Runs a part for at most `seconds`; on time's end its whole process group is killed, and its files removed."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        out, log = Path(folder) / "found.json", Path(folder) / "log"
        began, own = time.perf_counter(), {"env": os.environ | {"TMPDIR": folder}, "start_new_session": True}
        with log.open("w") as stream:
            command = part.command(device, quick, out)
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, **own)
            try:
                state = FAILED if process.wait(seconds) else DONE
            except subprocess.TimeoutExpired:
                state = LATE
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        row = {"state": state, "seconds": round(time.perf_counter() - began, 1), "end": log.read_text()[-4000:]}
        return row | ({"found": json.loads(out.read_text())["found"]} if out.exists() else {})


def in_order(parts: list[Part], rows: dict[str, Any]) -> list[Part]:
    """What is not done yet: first what was not tried, then what failed."""
    state = {part.name: rows.get(part.name, {}).get("state", NOT_RUN) for part in parts}
    return sorted((p for p in parts if state[p.name] != DONE), key=lambda part: state[part.name] != NOT_RUN)


def session(parts: list[Part], out: Path, device: str, quick: bool, budget: float) -> dict[str, Any]:
    """Runs what is not done yet, as far as the budget of seconds goes; the file grows with each part."""
    ends = time.perf_counter() + budget
    result = json.loads(out.read_text()) if out.exists() else heading(device, quick)
    if (result["device"], result["quick"]) != (device, quick):
        raise SystemExit(f"{out} is of another device or size; give another --out")
    rows = result["parts"]
    for part in parts:  # a call that is killed has them in its file, too
        rows.setdefault(part.name, {"state": NOT_RUN, "why": "the call has not come to it"})
    for part in in_order(parts, rows):
        left = ends - time.perf_counter()
        if why := part.why_not(device, quick):
            rows[part.name] = {"state": NOT_RUN, "why": why}
        elif left < part.least(quick):
            before = rows.get(part.name, {"state": NOT_RUN})
            rows[part.name] = before | {"why": f"{left:.0f} s of the call were left; the next call runs it"}
        else:
            rows[part.name] = {"state": BEGUN}
            common.write(result, out)  # should this process be killed, the file tells in which part
            rows[part.name] = row = run(part, device, quick, min(part.limit * LONGER[device], left))
            print(f"{part.name:36}{row['state']:10}{row['seconds']:8.1f} s", flush=True)
        common.write(result, out)
    return result


def heading(device: str, quick: bool) -> dict[str, Any]:
    """The machine, no parts yet, and what cannot be measured."""
    result = common.heading(PACKAGES)
    code = "import torch; print(torch.cuda.get_device_name(), torch.version.cuda)"
    if device == "cuda":
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit("there is no GPU that torch sees; --device cpu --quick runs the parts at pico sizes")
        result["machine"]["device"] = done.stdout.strip()
    return result | {"device": device, "quick": quick, "not measured": ABSENT, "parts": {}}


def chosen(quick: bool) -> list[Part]:
    """All parts; those at pico sizes only with `--quick`, and those of a shape only without."""
    pico = ("steps", "folder to student, pico")
    return [part for part in PARTS if quick or part.name not in pico]


def options() -> Any:
    parser = common.parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="pico sizes")
    parser.add_argument("--budget", type=float, help=f"seconds of this call; default: {CALL}, on a CPU no end")
    parser.add_argument("--redo", nargs="*", default=[], metavar="PART", help="run these again")
    parser.add_argument("--list", action="store_true", help="print the parts and their limits")
    parser.add_argument("--show", action="store_true", help="print what the file holds, and run nothing")
    parser.add_argument("--out", type=Path, default=common.dated("gpu_session"))
    return parser


def main() -> None:
    given = options().parse_args()
    parts = chosen(given.quick)
    if unknown := sorted({*given.redo} - {part.name for part in parts}):
        raise SystemExit(f"there is no part '{unknown[0]}'; legal are {', '.join(part.name for part in parts)}")
    if given.list:
        print(*(f"{part.name:36}{part.limit:5} s  {' '.join(part.words)}" for part in parts), sep="\n")
        return
    if given.show:
        print(*summary(json.loads(given.out.read_text())), sep="\n")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part that runs ends, too
    if given.redo and given.out.exists():
        result = json.loads(given.out.read_text())
        result["parts"] = {name: row for name, row in result["parts"].items() if name not in given.redo}
        common.write(result, given.out)
    budget = given.budget or {"cuda": CALL, "cpu": float("inf")}[given.device]
    result = session(parts, given.out, given.device, given.quick, budget)
    print("", *summary(result), "", given.out, sep="\n")
    able = [part for part in parts if not part.why_not(given.device, given.quick)]
    raise SystemExit(any(result["parts"][part.name]["state"] != DONE for part in able))


if __name__ == "__main__":
    main()
