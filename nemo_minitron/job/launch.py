"""Starting the processes of a stage: one Python process, or torchrun for a layout of several.

They hang on a lifeline: standard input is a pipe whose other end this process alone holds. However it
ends, by Ctrl-C, SIGTERM or SIGKILL, the pipe closes and the workers leave: no orphan goes on training.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from nemo_minitron.errors import InputError

WORKER = "nemo_minitron.nemo.worker"
ERRORS = "MINITRON_ERRORS"  # a folder where a rank leaves the sentence of the refusal that ended it
LIFELINE = "MINITRON_LIFELINE"  # set: standard input is the lifeline
PATIENCE = 10  # seconds until processes that were told to end are killed


def launch(stage: str, settings: dict[str, Any], processes: int, log: Path | None = None) -> None:
    """Runs a stage of `nemo_minitron.nemo.worker` with these settings in so many processes on this machine.

    Everything the processes print goes to `log`, but for their lines of progress. One rank's failure ends
    them all. Raises InputError with the sentence of the rank that refused, RuntimeError for any other end.
    """
    with tempfile.TemporaryDirectory(prefix="minitron-") as scratch:
        file = Path(scratch) / "settings.json"
        file.write_text(json.dumps(settings))
        command = [sys.executable, *_torchrun(processes), "-m", WORKER, stage, str(file)]
        code, tail = _follow(command, os.environ | _environment(processes) | {ERRORS: scratch}, log)
        refusals = sorted(Path(scratch).glob("refused-*"))
        if refusals:
            raise InputError(refusals[0].read_text())
    if code:
        where = f"; all of it is in {log}" if log else ""
        raise RuntimeError(f"{stage} ended with exit code {code}: {_cause(tail)}{where}")


def _torchrun(processes: int) -> list[str]:
    if processes == 1:
        return []
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def _environment(processes: int) -> dict[str, str]:
    """Threads share the cores; one CUDA queue keeps Megatron's overlap of communication in order."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    wanted = {"OMP_NUM_THREADS": str(threads), "CUDA_DEVICE_MAX_CONNECTIONS": "1", "TOKENIZERS_PARALLELISM": "false"}
    wanted[LIFELINE] = "1"
    if processes == 1:
        wanted |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def _cause(lines: list[str]) -> str:
    """The first rank's exception among a job's last lines: later ones are of ranks that it took along."""
    errors = [line for line in lines if re.match(r"(\[rank\d+\]:\s*)?[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (errors or lines or ["it printed nothing"])[0].strip()


def _follow(command: list[str], environment: dict[str, str], log: Path | None) -> tuple[int, list[str]]:
    """Passes lines of progress ('  > ...') on to the screen; keeps the last lines for a message."""
    last: list[str] = []
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace",
    )  # fmt: skip
    try:
        with open(log or os.devnull, "a") as file:
            assert process.stdout
            for line in process.stdout:
                file.write(line)
                if line.startswith("  > "):
                    print(line[2:], end="", flush=True)
                last = [*last[-199:], line]
        return process.wait(), last
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """Lets go of the lifeline, and waits until all are gone."""
    assert process.stdin
    process.stdin.close()
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
