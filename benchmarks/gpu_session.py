"""All that one Hopper can show, in the order of its value, in calls of under ten minutes:

    python benchmarks/gpu_session.py                         # a second call goes on where the first ended
    python benchmarks/gpu_session.py --device cpu --quick    # every part at pico sizes; its numbers mean nothing

Each part is a process of its own under a time limit: `tests/gpu`, whole jobs (`gpu_job.py`), then times (`gpu.py`,
`gpu_kernels.py`). `benchmarks/results/DATE_gpu_session.json` is written after each part: its state, its seconds, the
end of its output, and its numbers. Parts that are done are not run again; `--redo` names those that are. The job needs
the demo's files and `pip install -e .`; `--list` prints the parts.
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

PACKAGES = ["torch", "megatron-core", "nemo_toolkit", "transformer-engine", "triton", "nvidia-modelopt", "liger-kernel"]
LEAST = 20  # seconds that must be left for a part to begin
DONE, FAILED, LATE = "done", "failed", "timed out"


@dataclasses.dataclass(frozen=True)
class Part:
    """A script of `benchmarks/` or a module with its arguments. `limit`: seconds; `anywhere`: it runs without a GPU."""

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


PARTS = (
    Part("suite", ("-m", "pytest", str(common.ROOT / "tests" / "gpu"), "-q", "-rs"), 280),
    Part("job in bf16", ("gpu_job.py", "--precision", "bf16"), 240),
    Part("job in FP8", ("gpu_job.py", "--precision", "fp8-current"), 240),
    Part("job of a 1B in FP8", ("gpu_job.py", "--shape", "Llama-3.2-1B", "--precision", "fp8-current"), 300),
    Part("steps of the 8B pair", ("gpu.py", "--only", "step: Llama-3.1-8B"), 240),
    Part("steps of the 1B pair", ("gpu.py", "--only", "step: Llama-3.2-1B"), 180),
    Part("scoring", ("gpu.py", "--only", "importance"), 90),
    Part("losses", ("gpu.py", "--only", "loss"), 120),
    Part("kernels", ("gpu_kernels.py",), 120, anywhere=False),
)


def run(part: Part, device: str, quick: bool, seconds: float) -> dict[str, Any]:
    """Runs a part for at most `seconds`; on time's end its whole process group is killed."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "found.json", Path(folder) / "log"
        began = time.perf_counter()
        with log.open("w") as stream:
            command = part.command(device, quick, out)
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                state = FAILED if process.wait(seconds) else DONE
            except subprocess.TimeoutExpired:
                state = LATE
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        row = {"state": state, "seconds": round(time.perf_counter() - began, 1), "end": log.read_text()[-2000:]}
        return row | ({"found": json.loads(out.read_text())} if out.exists() else {})


def session(parts: list[Part], out: Path, device: str, quick: bool, budget: float) -> dict[str, Any]:
    """Runs what is not done yet, as far as the budget of seconds goes; the file grows with each part."""
    began = time.perf_counter()
    result = json.loads(out.read_text()) if out.exists() else common.heading(PACKAGES) | {"parts": {}}
    for part in parts:
        left = budget - (time.perf_counter() - began)
        if result["parts"].get(part.name, {}).get("state") == DONE:
            continue
        if left < LEAST:
            print(f"{part.name}: left for the next call")
            continue
        row = run(part, device, quick, min(part.limit, left))
        result["parts"][part.name] = row
        common.write(result, out)
        print(f"{part.name:24}{row['state']:10}{row['seconds']:8.1f} s", flush=True)
        if row["state"] != DONE:
            print(row["end"][-600:], flush=True)
    return result


def chosen(device: str, quick: bool) -> list[Part]:
    """All parts on a GPU; on a CPU those that run there, and with `--quick` none of a named shape."""
    if device == "cuda":
        return list(PARTS)
    parts = [part for part in PARTS if part.anywhere]
    return [part for part in parts if "Llama" not in " ".join(part.words)] if quick else parts


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="pico sizes")
    parser.add_argument("--budget", type=float, default=570, help="seconds of this call")
    parser.add_argument("--redo", nargs="*", default=[], metavar="PART", help="run these again")
    parser.add_argument("--list", action="store_true", help="print the parts and their limits")
    parser.add_argument("--out", type=Path, default=common.dated("gpu_session"))
    given = parser.parse_args()
    parts = chosen(given.device, given.quick)
    if unknown := sorted({*given.redo} - {part.name for part in parts}):
        raise SystemExit(f"there is no part '{unknown[0]}'; legal are {', '.join(part.name for part in parts)}")
    if given.list:
        print(*(f"{part.name:24}{part.limit:5} s  {' '.join(part.words)}" for part in parts), sep="\n")
        return
    if given.redo and given.out.exists():
        result = json.loads(given.out.read_text())
        result["parts"] = {name: row for name, row in result["parts"].items() if name not in given.redo}
        common.write(result, given.out)
    result = session(parts, given.out, given.device, given.quick, given.budget)
    open_ = [part.name for part in parts if result["parts"].get(part.name, {}).get("state") != DONE]
    print(
        f"{given.out}: {len(parts) - len(open_)} of {len(parts)} parts done"
        + f"; open: {', '.join(open_)}" * bool(open_)
    )
    raise SystemExit(1 if open_ else 0)


if __name__ == "__main__":
    main()
