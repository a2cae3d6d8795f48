"""Real processes for the tests' workers, and leaving a layout for the next one.

Loading NeMo takes longer than most workers' work. So each process of pytest has one that has loaded it, this file run
as a script, and all ranks are forked from that: each begins as if torchrun had started it and it had imported NeMo.
What the package starts itself, by torchrun, is started so in the tests of its commands.
"""

from __future__ import annotations

import functools
import importlib
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
TAIL = 6000  # characters of a failed worker's output


def run_ranks(world: int, worker: Path, *arguments: object, timeout: float = 600) -> None:
    """Runs a worker's file in so many processes: one that fails ends them all, and so does the time."""
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        order = {"world": world, "command": [str(worker), *map(str, arguments)], "log": log.name, "cwd": os.getcwd()}
        code = _ask(_server(), order, timeout)
        assert code == 0, f"{worker.name}: exit code {code}\n{log.read()[-TAIL:]}"


@functools.cache
def _server() -> subprocess.Popen[str]:
    """It ends with this process, when its standard input closes."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, __file__], env=environment, stdin=pipe, stdout=pipe, text=True, bufsize=1)


def _ask(server: subprocess.Popen[str], order: dict[str, object], timeout: float) -> int:
    assert server.stdin
    assert server.stdout
    server.stdin.write(json.dumps(order) + "\n")
    agent = int(server.stdout.readline())
    if not select.select([server.stdout], [], [], timeout)[0]:
        os.killpg(agent, signal.SIGKILL)
        server.stdout.readline()
        raise TimeoutError(f"{order['command']} took more than {timeout} s")
    return int(server.stdout.readline())


def _serve() -> None:
    """One order a line: answers with the agent's process, then with its exit code."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import gc

    import nemo.collections.llm  # noqa: F401

    gc.freeze()  # what was loaded stays: ranks need not look through it
    for line in sys.stdin:
        agent = os.fork()
        if not agent:
            _lead(**json.loads(line))  # comes back in a rank, when it has done its work
            break
        print(agent, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(agent, 0)[1]), file=answers)


def _lead(world: int, command: list[str], log: str, cwd: str) -> None:
    """The agent, in a session of its own, its output in the log; it comes back in the ranks."""
    os.setsid()
    os.chdir(cwd)
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    for number, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, out)):
        os.dup2(target, number)
    store, port = _store()
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    agent = {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_RUN_ID": "tests"}
    os.environ.update({name: str(value) for name, value in {**place, **agent}.items()})
    for rank in range(world):
        if not os.fork():
            os.environ.update({name: str(rank) for name in ("RANK", "LOCAL_RANK")})
            _run(command)
            return
    for _ in range(world):
        if os.wait()[1]:
            os.killpg(0, signal.SIGKILL)
    os.kill(store, signal.SIGKILL)
    os._exit(0)


def _store() -> tuple[int, int]:
    """The process of the store where the ranks meet, and its port. A rank that had inherited the store would wait for
    its thread, which no fork takes along."""
    from torch.distributed import TCPStore

    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        os.write(writer, str(store.port).encode())
        signal.pause()
    return process, int(os.read(reader, 16))


def _run(command: list[str]) -> None:
    """The worker's `main`. The process where Megatron's writers of checkpoints leave their results is forked, too:
    Megatron would start it anew, to load torch once more."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    importlib.import_module(Path(command[0]).stem).main()


def leave_layout() -> None:
    """Ends Megatron's layout and its groups: gloo wakes two threads of each a hundred times a second while it lives,
    and Megatron makes 25 a layout: after twenty layouts the processes did little else.

    A group lives as long as a model that names it, and models with an optimizer sit in reference cycles.
    """
    import gc

    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.distributed.distributed_c10d import _world

    parallel_state.destroy_model_parallel()
    for group in [group for group in _world.pg_map if group is not dist.group.WORLD]:
        dist.destroy_process_group(group)
    gc.collect()


if __name__ == "__main__":
    _serve()
