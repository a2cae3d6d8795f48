"""Starts the processes of a stage: one Python process, or torchrun for a layout of several processes.

Their standard input is a pipe, the lifeline. Only this process holds its other end. When this process ends, by Ctrl-C,
SIGTERM or SIGKILL, the pipe closes and the workers end too, so that no training goes on without its command.
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
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.artifacts.files import naming
from nemo_minitron.artifacts.temporary import apart
from nemo_minitron.artifacts.typed import plain
from nemo_minitron.launch.death import killed, oom_kills
from nemo_minitron.launch.machines import StageOrder, StageResult, free_port, leading
from nemo_minitron.launch.output import Output
from nemo_minitron.launch.stall import ask_for_stacks, kill, stall_timeout, stalled, unheard, words_of
from nemo_minitron.settings.progress import LIFELINE

if TYPE_CHECKING:
    from nemo_minitron.settings.orders import Order

ERRORS = "MINITRON_ERRORS"  # names a folder, to which a rank writes the sentence of the refusal that ended it
PATIENCE = 10  # seconds until processes that were told to end are killed
SAVING = ("distill", "finetune")  # stages whose processes save a checkpoint when they are told to stop
# Slurm sends SIGTERM to every process of a step. torchrun would then end its workers before they have saved.
IGNORE_SIGTERM = ("sh", "-c", 'trap "" TERM; exec "$@"', "minitron")
# The option exists since torch 2.10. With an older torch, workers have 30 s to save.
FORWARD_SIGNALS = ("--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT")
# Variables by which a launcher describes its own processes.
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launch(order: Order, worker: str, log: Path | None = None) -> None:
    """Runs the module `worker` on an order, in the processes of its layout, and waits for their end. They run on this
    machine, or on all machines that this process leads (`machines.lead`).

    Everything that the processes print goes to `log`; their lines of progress also go to the screen. If one rank fails,
    all of them end. Raises InputError with the sentence of the rank that refused its input, DivergedError for a
    training that diverged, and RuntimeError for any other failure.
    """
    stage, leader = StageOrder(order.stage, worker, plain(order), order.processes, log=str(log or "")), leading()
    if leader:
        leader.run(stage, run)
    else:
        run(stage, 0, lambda stop: None).check(order.stage)


def run(order: StageOrder, node: int, watch: Callable[[Callable[[], None]], None]) -> StageResult:
    """Runs this machine's processes of an order and waits for their end. A `machines.Work`: `watch` gets a function
    that ends the processes. The name of the log has the node's number, except on the first node."""
    output, killed_before = Output(_log(order.log, node)), oom_kills()
    with apart() as scratch:
        file = scratch / "order.json"
        with naming(file):
            file.write_text(json.dumps(order.order))
        command = [*_python(order, node), "-m", order.worker, order.stage, str(file)]
        environment = _environment(order) | {ERRORS: str(scratch)}
        code, stall = _follow(command, environment, output, watch, order.each if order.stage in SAVING else 0)
        refusals = [path.read_text() for path in sorted(scratch.glob("refused-*"))]
    cause = stall or killed(code, output.tail, killed_before, _alone(order)) or output.cause()
    if output.lost:
        print(output.lost, file=sys.stderr, flush=True)
        return StageResult(code, refusals[0] if refusals else "", f"{cause}; {output.lost}")
    return StageResult(code, refusals[0] if refusals else "", cause, str(output.log or ""))


def _log(log: str, node: int) -> Path | None:
    path = Path(log) if log else None
    return path.with_name(f"{path.stem}-node{node}{path.suffix}") if path and node else path


def _alone(order: StageOrder) -> bool:
    """Whether the stage has one process, which needs no torchrun."""
    return order.each * order.nodes == 1


def _python(order: StageOrder, node: int) -> list[str]:
    """The words of the command before `-m WORKER`. The nodes' ranks are fixed, so that rank 0, which prints lines of
    progress, runs on the first node."""
    if _alone(order):
        return [sys.executable]
    command = [*IGNORE_SIGTERM, sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(order.each)]
    if _torch() >= (2, 10):
        command += FORWARD_SIGNALS
    if order.nodes == 1:
        return [*command, "--standalone"]
    place = ["--master-addr", order.host, "--master-port", str(order.port)]
    return [*command, "--nnodes", str(order.nodes), "--node-rank", str(node), *place]


def _torch() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("torch"))[:2])


def _environment(order: StageOrder) -> dict[str, str]:
    """The environment of the processes. A user's own values win over the defaults.

    The threads of the processes share the cores. One CUDA queue keeps Megatron's overlap of communication in order.
    The variables of a launcher around this process are removed, because they describe other processes. Under srun,
    Lightning would take a single process for one of srun's tasks; Slurm's name of an interactive job prevents that.
    """
    threads = max(1, (os.cpu_count() or 1) // order.each)
    defaults = {"OMP_NUM_THREADS": str(threads), "CUDA_DEVICE_MAX_CONNECTIONS": "1", "TOKENIZERS_PARALLELISM": "false"}
    values = defaults | {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} if _alone(order) else {}
    if alone:  # Bridge's default port is one for all jobs of a machine
        alone |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    slurm = {"SLURM_JOB_NAME": "interactive"} if "SLURM_NTASKS" in values else {}
    return values | alone | slurm | {LIFELINE: "1"}


def _follow(
    command: list[str], environment: dict[str, str], output: Output, watch: Callable[[Callable[[], None]], None],
    saving: int,
) -> tuple[int, str]:  # fmt: skip
    """Starts the command and waits for its end. Returns the exit code and, if the stage stalled, a sentence about that.

    `saving`: the number of processes that save a checkpoint when they are told to stop. The processes have their own
    session, so that a terminal's Ctrl-C reaches this process alone, which then tells them.
    """
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    reader = threading.Thread(target=output.read, args=(process.stdout,), daemon=True)
    reader.start()
    watch(lambda: _let_go(process))
    try:
        with _saved_when_told(process, saving):
            stall = _wait(process, output)
            reader.join(PATIENCE)  # a killed rank's helper may hold the output open for ever
            return (1 if stall else process.returncode), stall
    finally:
        _end(process)
        output.bar.close()


def _wait(process: subprocess.Popen[str], output: Output) -> str:
    """Waits until the processes have ended, and returns nothing. If none of them makes progress any more, ends them and
    returns a sentence about the rank that holds the others up."""
    timeout, begun = stall_timeout(), time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
            return ""
        if stalled(output.ranks, begun, timeout):
            output.ranks.update(unheard(output.ranks, process.pid))
            stall = words_of(output.ranks, begun)
            ask_for_stacks(output.ranks, process.pid)
            kill(output.ranks, process.pid)
            _end(process)
            return f"{stall}; --stall-timeout sets for how long it may"


@contextlib.contextmanager
def _saved_when_told(process: subprocess.Popen[str], saving: int) -> Iterator[None]:
    """In the block, the first SIGTERM or Ctrl-C tells the processes to save a checkpoint and to end, and takes effect
    here only after that. A second one takes effect at once."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    handled = [number for number, handler in handlers.items() if handler != signal.SIG_IGN]
    if not saving or not handled or threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def restore() -> None:
        for number in handled:
            signal.signal(number, handlers[number])

    def ask(number: int, frame: object) -> None:
        received.append(number)
        restore()
        print("told to stop: a checkpoint is saved first; a second signal ends the job at once", flush=True)
        with contextlib.suppress(OSError, ValueError):  # the processes may have ended by themselves
            assert process.stdin
            os.write(process.stdin.fileno(), b"s" * saving)  # each process reads one byte

    for number in handled:
        signal.signal(number, ask)
    try:
        yield
    finally:
        restore()
        if received:
            signal.raise_signal(received[0])


def _let_go(process: subprocess.Popen[str]) -> None:
    """Closes the lifeline. The workers end at once."""
    assert process.stdin
    with contextlib.suppress(OSError, ValueError):
        process.stdin.close()


def _end(process: subprocess.Popen[str]) -> None:
    """Closes the lifeline and waits until the processes have ended."""
    _let_go(process)
    if process.poll() is None:
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
