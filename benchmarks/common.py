"""The parts that all benchmarks share: options, the result file, texts, and measurements on a shared machine.

Other jobs may run on the machine. So repetitions are interleaved, and CPU seconds stand beside wall seconds.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MODEL, TEXT = ROOT / "demo" / "smollm2-135m-instruct", ROOT / "demo" / "wikipedia"  # of the demo
Functions = dict[str, Callable[[], object]]
# Freed blocks of 64 KiB and more go back to the system, so that the resident size shows the memory in use.
EXACT_HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of options that shows a script's docstring, with its lines as they are."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def heading(packages: Sequence[str]) -> dict[str, Any]:
    """The first entries of a result: the command, the date, the machine."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return {"command": command, "date": datetime.date.today().isoformat(), "machine": machine(packages)}


def dated(name: str) -> Path:
    """The file of today's result: `benchmarks/results/DATE_NAME.json`."""
    return RESULTS / f"{datetime.date.today().isoformat()}_{name}.json"


def write(result: dict[str, Any], out: Path | None) -> None:
    """Writes a result as JSON, with the load at the end; None writes nothing."""
    if isinstance(result.get("machine"), dict):
        result["machine"]["load when it ended"] = round(os.getloadavg()[0], 1)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


def with_range(values: Sequence[float]) -> str:
    """[median, least, most, ...] as a cell of a table."""
    return "{:.3f} ({:.3f}-{:.3f})".format(*values[:3])


def token_rows(model: Path | str, text: Path | str, count: int, length: int) -> Any:
    """The first `count` rows of a text, int64 [count, length]: its documents one after the other, without marks."""
    import torch

    from nemo_minitron.data import documents, load_tokenizer

    tokenizer, ids = load_tokenizer(str(model)), []
    for document in documents(text):
        ids += tokenizer(document, add_special_tokens=False).input_ids
        if len(ids) >= count * length:
            break
    return torch.tensor(ids[: count * length]).view(count, length)


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """Processor, cores, load before the run, and the versions of those packages that are installed."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    installed = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    versions = {n: installed[plain] for n in packages if (plain := n.lower().replace("_", "-")) in installed}
    load = round(os.getloadavg()[0], 1)
    return {"processor": names[0] if names else "?", "cores": os.cpu_count(), "load": load, "versions": versions}


def interleaved(functions: Functions, repetitions: int) -> dict[str, list[dict[str, float]]]:
    """Seconds of each function in each of `repetitions` rounds, after one round to warm up.

    Every other round runs the functions in reverse order."""
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for repetition in range(repetitions):
        for name in list(functions)[:: 1 if repetition % 2 else -1]:
            wall, cpu = time.perf_counter(), time.process_time()
            functions[name]()
            seconds[name].append({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu})
    return seconds


def summary(seconds: dict[str, list[dict[str, float]]], base: str) -> dict[str, dict[str, list[float]]]:
    """[median, least, most] for each function: wall and CPU seconds, and its CPU seconds over those of `base` in a
    round.

    `least`: its least CPU seconds over the least of `base`. Other jobs can only add time, so on a busy machine this is
    the best estimate.
    """
    rows = {}
    for name, runs in seconds.items():
        row = {clock: [run[clock] for run in runs] for clock in ("wall", "cpu")}
        row["ratio"] = [run["cpu"] / other["cpu"] for run, other in zip(runs, seconds[base], strict=True)]
        rows[name] = {key: [round(x, 4) for x in (statistics.median(v), min(v), max(v))] for key, v in row.items()}
        rows[name]["least"] = [round(min(row["cpu"]) / min(run["cpu"] for run in seconds[base]), 4)]
    return rows


def resident_peaks(functions: Functions) -> dict[str, float]:
    """MiB that each function, run one after the other, reaches above the resident set before all of them (Linux's
    VmHWM)."""
    gc.collect()
    before, peaks = _resident("VmRSS"), {}
    for name, function in functions.items():
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        function()
        peaks[name] = round(_resident("VmHWM") - before, 2)
    return peaks


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def by_operation(functions: Functions, base: str, top: int = 8) -> dict[str, dict[str, float]]:
    """For each function but `base`: the operations that take more time than in `base`, in ms (torch's profiler, self
    time)."""
    from torch.profiler import ProfilerActivity, profile

    times: dict[str, dict[str, float]] = {name: {} for name in functions}
    for name, function in [*functions.items()] * 3:  # the least of three, because other jobs can only add time
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            function()
        for event in profiled.key_averages():
            times[name][event.key] = min(event.self_cpu_time_total / 1e3, times[name].get(event.key, float("inf")))
    extra = {}
    for name in times.keys() - {base}:
        more = {key: round(ms - times[base].get(key, 0.0), 2) for key, ms in times[name].items()}
        more = {key: ms for key, ms in more.items() if key not in ("aten::mm", "aten::bmm")}  # their time is noise
        extra[name] = dict(sorted(more.items(), key=lambda item: -item[1])[:top])
    return extra


def run_measured(*command: object) -> dict[str, float]:
    """Runs a command; its seconds, and the peak resident set of its largest process in MB (10^6 bytes)."""
    start = time.perf_counter()
    child = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    errors = child.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{errors[-3000:]}")
    return {"seconds": round(time.perf_counter() - start, 1), "peak MB": round(usage.ru_maxrss * 1024 / 1e6)}
