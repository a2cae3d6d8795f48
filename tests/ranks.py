"""Real processes for the tests' workers, and leaving a layout for the next one.

All ranks of a worker are forked from a process that has loaded NeMo (`forked.py`): each begins as if torchrun had
started it. What the package starts itself, by torchrun, is started so in the tests of its commands.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import forked
from forked_server import fork_writers

TESTS = Path(__file__).parent
TAIL = 6000  # characters of a failed worker's output


def run_ranks(world: int, worker: Path, *arguments: object, timeout: float = 600) -> None:
    """Runs a worker's file in so many processes: one that fails ends them all, and so does the time."""
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        command = [str(worker), *map(str, arguments)]
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        agent = forked.call("ranks:lead", world, command, start_new_session=True, **streams)
        try:
            code = agent.wait(timeout)
        finally:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
                agent.wait()
        assert code == 0, f"{worker.name}: exit code {code}\n{Path(log.name).read_text(errors='replace')[-TAIL:]}"


def lead(world: int, command: list[str]) -> None:
    """The agent; it comes back in each rank, too, when that has done its work."""
    store, port = _store()
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    agent = {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_RUN_ID": "tests"}
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.update({name: str(value) for name, value in {**place, **agent, "PYTHONPATH": paths}.items()})
    for rank in range(world):
        if not os.fork():
            os.environ.update({name: str(rank) for name in ("RANK", "LOCAL_RANK")})
            _run(command)
            return
    for _ in range(world):
        if os.wait()[1]:
            os.killpg(0, signal.SIGKILL)
    os.kill(store, signal.SIGKILL)


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
    """The worker's `main`."""
    fork_writers()
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
