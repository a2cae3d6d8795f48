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
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.artifacts.files import naming
from nemo_minitron.artifacts.temporary import apart
from nemo_minitron.artifacts.typed import plain
from nemo_minitron.launch.death import killed, oom_kills
from nemo_minitron.launch.machines import StageOrder, StageResult, leading
from nemo_minitron.launch.output import Output
from nemo_minitron.launch.stall import ask_for_stacks, kill, stall_timeout, stalled, unheard, words_of

if TYPE_CHECKING:
    from nemo_minitron.settings.orders import Order

ERRORS = "MINITRON_ERRORS"  # a folder where a rank leaves the sentence of the refusal that ended it
LIFELINE = "MINITRON_LIFELINE"  # set: standard input is the lifeline
PATIENCE = 10  # seconds until processes that were told to end are killed
SAVING = ("distill", "finetune")  # stages whose processes save what they have when they are told to stop
# Slurm sends SIGTERM to every process of a step: torchrun would end its workers before they have saved.
IGNORE_SIGTERM = ("sh", "-c", 'trap "" TERM; exec "$@"', "minitron")
# Of torch 2.10 and later; before, workers get 30 s to save.
FORWARD_SIGNALS = ("--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT")
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launch(order: Order, worker: str, log: Path | None = None) -> None:
    """Runs the module `worker` on an order, in the processes of its layout: on this machine, or on all machines that
    this process leads (`machines.lead`).

    Everything the processes print goes to `log`, but for their lines of progress. One rank's failure ends
    them all. Raises InputError with the sentence of the rank that refused, RuntimeError for any other end.
    """
    stage, leader = StageOrder(order.stage, worker, plain(order), order.processes, log=str(log or "")), leading()
    if leader:
        leader.run(stage, run)
    else:
        run(stage, 0, lambda stop: None).check(order.stage)


def run(order: StageOrder, node: int, watch: Callable[[Callable[[], None]], None]) -> StageResult:
    """This host's processes of an order; `watch` is given a function that ends them. The log of a node that is not
    the first has its number."""
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
    """One process, which needs no torchrun."""
    return order.each * order.nodes == 1


def _python(order: StageOrder, node: int) -> list[str]:
    """Nodes have fixed ranks: the first one has rank 0, which says how far a stage is."""
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
    """Threads share the cores; one CUDA queue keeps Megatron's overlap of communication in order.

    What launchers say of their own processes is no business of these: Lightning would take one alone for one of
    srun's tasks.
    """
    threads = max(1, (os.cpu_count() or 1) // order.each)
    wanted = {"OMP_NUM_THREADS": str(threads), "CUDA_DEVICE_MAX_CONNECTIONS": "1", "TOKENIZERS_PARALLELISM": "false"}
    found = wanted | {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} if _alone(order) else {}
    slurm = {"SLURM_JOB_NAME": "interactive"} if "SLURM_NTASKS" in found else {}
    return found | alone | slurm | {LIFELINE: "1"}


def _follow(
    command: list[str], environment: dict[str, str], output: Output, watch: Callable[[Callable[[], None]], None],
    saving: int,
) -> tuple[int, str]:  # fmt: skip
    """The exit code, and which rank has held the others for too long, if one has. `saving`: how many processes save
    what they have when they are told to stop; 0 for none. A terminal's Ctrl-C reaches this process alone."""
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
            reader.join(PATIENCE)  # a helper of a rank that was killed may hold the output open for ever
            return (1 if stall else process.returncode), stall
    finally:
        _end(process)


def _wait(process: subprocess.Popen[str], output: Output) -> str:
    """Until they have ended; or until none of them makes progress any more, and then says which holds the others."""
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
    """The first SIGTERM or Ctrl-C waits until the processes have saved what they have and ended; a second one does
    not."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    heard = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    if not saving or not heard or threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []

    def let_go() -> None:
        for number in heard:
            signal.signal(number, before[number])

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        let_go()
        print("told to stop: saves a checkpoint first; told again, it ends at once", flush=True)
        with contextlib.suppress(OSError, ValueError):  # they have ended by themselves
            assert process.stdin
            os.write(process.stdin.fileno(), b"s" * saving)

    for number in heard:
        signal.signal(number, ask)
    try:
        yield
    finally:
        let_go()
        if asked:
            signal.raise_signal(asked[0])


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
