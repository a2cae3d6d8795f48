"""Starting the processes of a stage: one Python process, or torchrun for a layout of several.

They hang on a lifeline: standard input is a pipe whose other end this process alone holds. However it
ends, by Ctrl-C, SIGTERM or SIGKILL, the pipe closes and the workers leave: no orphan goes on training.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nemo_minitron.errors import visible
from nemo_minitron.job.processes.together import Ending, Order, leading

WORKER = "nemo_minitron.nemo.worker"
ERRORS = "MINITRON_ERRORS"  # a folder where a rank leaves the sentence of the refusal that ended it
LIFELINE = "MINITRON_LIFELINE"  # set: standard input is the lifeline
PATIENCE = 10  # seconds until processes that were told to end are killed
TAIL = 200  # lines of output that a message may come from
SAVING = ("distill", "finetune")  # stages whose processes save what they have when they are told to stop
# Slurm sends SIGTERM to every process of a step: torchrun would end its workers before they have saved.
DEAF = ("sh", "-c", 'trap "" TERM; exec "$@"', "minitron")
HEARS = ("--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT")  # of torch 2.10 and later; before, workers get 30 s to save
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launch(stage: str, settings: dict[str, Any], processes: int, log: Path | None = None) -> None:
    """Runs a stage of `nemo_minitron.nemo.worker` with these settings in so many processes: on this machine, or on
    all the hosts that this process leads (`together.lead`).

    Everything the processes print goes to `log`, but for their lines of progress. One rank's failure ends
    them all. Raises InputError with the sentence of the rank that refused, RuntimeError for any other end.
    """
    order, leader = Order(stage, settings, processes, log=str(log or "")), leading()
    if leader:
        leader.run(order, run)
    else:
        run(order, 0, lambda stop: None).check(stage)


def run(order: Order, node: int, watch: Callable[[Callable[[], None]], None]) -> Ending:
    """This host's processes of an order; `watch` is given a function that ends them. The log of a node that is not
    the first has its number."""
    log = _log(order.log, node)
    with tempfile.TemporaryDirectory(prefix="minitron-") as scratch:
        file = Path(scratch) / "settings.json"
        file.write_text(json.dumps(order.settings))
        command = [*_python(order, node), "-m", WORKER, order.stage, str(file)]
        environment = _environment(order) | {ERRORS: scratch}
        code, tail = _follow(command, environment, log, watch, order.each if order.stage in SAVING else 0)
        refusals = [path.read_text() for path in sorted(Path(scratch).glob("refused-*"))]
    return Ending(code, refusals[0] if refusals else "", _cause(tail), str(log or ""))


def _log(log: str, node: int) -> Path | None:
    path = Path(log) if log else None
    return path.with_name(f"{path.stem}-node{node}{path.suffix}") if path and node else path


def _python(order: Order, node: int) -> list[str]:
    """Nodes have fixed ranks: the first one has rank 0, which says how far a stage is."""
    if order.each * order.nodes == 1:
        return [sys.executable]
    command = [*DEAF, sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(order.each)]
    if _torch() >= (2, 10):
        command += HEARS
    if order.nodes == 1:
        return [*command, "--standalone"]
    place = ["--master-addr", order.host, "--master-port", str(order.port)]
    return [*command, "--nnodes", str(order.nodes), "--node-rank", str(node), *place]


def _torch() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("torch"))[:2])


def _environment(order: Order) -> dict[str, str]:
    """Threads share the cores; one CUDA queue keeps Megatron's overlap of communication in order.

    What launchers say of their own processes is no business of these: Lightning would take one alone for one of
    srun's tasks.
    """
    threads = max(1, (os.cpu_count() or 1) // order.each)
    wanted = {"OMP_NUM_THREADS": str(threads), "CUDA_DEVICE_MAX_CONNECTIONS": "1", "TOKENIZERS_PARALLELISM": "false"}
    found = wanted | {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} if order.each * order.nodes == 1 else {}
    slurm = {"SLURM_JOB_NAME": "interactive"} if "SLURM_NTASKS" in found else {}
    return found | alone | slurm | {LIFELINE: "1"}


def _cause(lines: list[str]) -> str:
    """The first rank's exception among a job's last lines: later ones are of ranks that it took along."""
    errors = [line for line in lines if re.match(r"(\[rank\d+\]:\s*)?[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (errors or lines or ["it printed nothing"])[0].strip()


def _follow(
    command: list[str], environment: dict[str, str], log: Path | None, watch: Callable[[Callable[[], None]], None],
    saving: int,
) -> tuple[int, list[str]]:  # fmt: skip
    """Passes lines of progress ('  > ...') on to the screen; keeps the last lines for a message. `saving`: how many
    processes save when SIGTERM comes; 0 for none."""
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace",
    )  # fmt: skip
    last: list[str] = []
    reader = threading.Thread(target=_read, args=(process, log, last), daemon=True)
    reader.start()
    watch(lambda: _let_go(process))
    try:
        with _saved_at_sigterm(process, saving):
            code = process.wait()
            reader.join(PATIENCE)  # a helper of a rank that was killed may hold the output open for ever
            return code, last[-TAIL:]
    finally:
        _end(process)


def _read(process: subprocess.Popen[str], log: Path | None, last: list[str]) -> None:
    assert process.stdout
    with open(log or os.devnull, "a") as file:
        for line in process.stdout:
            file.write(line)
            file.flush()
            if line.startswith("  > "):
                print(visible(line[2:].rstrip("\n")), flush=True)
            last[:] = [*last[1 - TAIL :], line]


@contextlib.contextmanager
def _saved_at_sigterm(process: subprocess.Popen[str], saving: int) -> Iterator[None]:
    """The first SIGTERM waits until the processes have saved what they have and ended; a second one does not."""
    before = signal.getsignal(signal.SIGTERM)
    if not saving or before == signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGTERM, before)
        print("told to stop: saves a checkpoint first", flush=True)
        with contextlib.suppress(OSError, ValueError):  # they have ended by themselves
            assert process.stdin
            os.write(process.stdin.fileno(), b"s" * saving)

    signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if asked.is_set():
            signal.raise_signal(signal.SIGTERM)


def _let_go(process: subprocess.Popen[str]) -> None:
    """Lets go of the lifeline: the workers leave at once."""
    assert process.stdin
    with contextlib.suppress(OSError, ValueError):
        process.stdin.close()


def _end(process: subprocess.Popen[str]) -> None:
    """Lets go of the lifeline, and waits until all are gone."""
    _let_go(process)
    if process.poll() is None:
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
