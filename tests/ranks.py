"""Real processes for the tests' workers: torchrun's agent and its ranks, and leaving a layout for the next one.

Loading NeMo takes longer than most workers' work. So each process of pytest has one that has loaded it, this file run
as a script, and torchrun's agent and all ranks are forked from that: each begins as if it had just imported NeMo.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
TAIL = 6000  # characters of a failed worker's output


def torchrun(world: int, worker: Path, *arguments: object, timeout: float = 600) -> None:
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
    import torch.distributed.run  # noqa: F401

    gc.freeze()  # what was loaded stays: ranks need not look through it
    for line in sys.stdin:
        agent = os.fork()
        if not agent:
            _become(json.loads(line))
        print(agent, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(agent, 0)[1]), file=answers)


def _become(order: dict[str, object]) -> None:
    """torchrun's agent, in a session of its own, its output in the log; never returns."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    code = 1
    try:
        os.setsid()
        os.chdir(order["cwd"])
        log = os.open(order["log"], os.O_WRONLY | os.O_APPEND)
        for number, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(target, number)
        layout = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=order["world"], run_id=str(os.getpid()), rdzv_backend="c10d",
            rdzv_endpoint="localhost:0", start_method="fork", max_restarts=0, monitor_interval=0.05,
        )  # fmt: skip
        elastic_launch(layout, _rank)(order["command"])
        code = 0
    except BaseException:  # printed, and never back into the server's loop
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _rank(command: list[str]) -> None:
    """The worker's file, as `python FILE ARGUMENTS` runs it."""
    import runpy

    sys.argv = command
    sys.path[0] = str(Path(command[0]).parent)
    runpy.run_path(command[0], run_name="__main__")


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
