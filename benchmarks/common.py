"""Measuring on a machine that others use too: interleaved repetitions, CPU beside wall seconds, resident peaks."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Functions = dict[str, Callable[[], object]]
# Blocks from 64 KiB on go back to the system when they are freed, so that a resident size says what is in use.
EXACT_HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """What ran: processor, cores, load before the run, versions of the packages that are there."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    there = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    versions = {name: there[plain] for name in packages if (plain := name.lower().replace("_", "-")) in there}
    load = round(os.getloadavg()[0], 1)
    return {"processor": names[0] if names else "?", "cores": os.cpu_count(), "load": load, "versions": versions}


def interleaved(functions: Functions, repetitions: int) -> dict[str, list[dict[str, float]]]:
    """Seconds of each function, `repetitions` times, in turn and each round in the other order; one round before."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for repetition in range(repetitions):
        for name in list(functions)[:: 1 if repetition % 2 else -1]:
            wall, cpu = time.perf_counter(), time.process_time()
            functions[name]()
            found[name].append({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu})
    return found


def summary(found: dict[str, list[dict[str, float]]], base: str) -> dict[str, dict[str, list[float]]]:
    """Of each function [median, least, most]: wall and CPU seconds, and its CPU seconds over `base`'s of the round.

    `least`: its least CPU seconds over `base`'s. Other jobs only ever add, so on a busy machine that says most.
    """
    rows = {}
    for name, runs in found.items():
        row = {clock: [run[clock] for run in runs] for clock in ("wall", "cpu")}
        row["ratio"] = [run["cpu"] / other["cpu"] for run, other in zip(runs, found[base], strict=True)]
        rows[name] = {key: [round(x, 4) for x in (statistics.median(v), min(v), max(v))] for key, v in row.items()}
        rows[name]["least"] = [round(min(row["cpu"]) / min(run["cpu"] for run in found[base]), 4)]
    return rows


def resident_peaks(functions: Functions) -> dict[str, float]:
    """MiB above the resident set before them all that each function reaches, one after the other (Linux's VmHWM)."""
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
    """Of each function but `base`: the operations that take more time in it, in ms (torch's profiler, self time)."""
    from torch.profiler import ProfilerActivity, profile

    times: dict[str, dict[str, float]] = {name: {} for name in functions}
    for name, function in [*functions.items()] * 3:  # the least of three: other jobs only ever add
        with profile(activities=[ProfilerActivity.CPU]) as found:
            function()
        for event in found.key_averages():
            times[name][event.key] = min(event.self_cpu_time_total / 1e3, times[name].get(event.key, float("inf")))
    extra = {}
    for name in times.keys() - {base}:
        more = {key: round(ms - times[base].get(key, 0.0), 2) for key, ms in times[name].items()}
        more = {key: ms for key, ms in more.items() if key not in ("aten::mm", "aten::bmm")}  # noise, not ours
        extra[name] = dict(sorted(more.items(), key=lambda item: -item[1])[:top])
    return extra
