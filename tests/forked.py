"""Commands in processes that are forked from one process that has loaded NeMo.

Loading NeMo takes longer than most of the work that tests give a command. So each process of pytest has one server,
`forked_server.py`, which loads NeMo once, and a command is forked from it instead of being executed. Every process that
the command starts by `python -m` is forked too: torchrun's agent, and its ranks. The rest is unchanged: each process is
its starter's child and has its own session, environment, folder, pipes, arguments and exit code. Some tests execute
their processes: those of signals (`test_signals.py`, `tests/launch`), and the job that `test_nemo_command.py`
starts as a user does.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

MODULES = ("nemo_minitron.", "torch.distributed.run")  # what is run by `python -m`, and is forked
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "NEMORUN_", "PYTHON", "LD_")  # begin names that libraries read early
BORN_WITH = dict(os.environ)  # before any test has changed it; the server's too
SERVER = Path(__file__).with_name("forked_server.py")
SUBREAPER = 36  # prctl: an orphan becomes the child of this process
EXECUTE = subprocess.Popen._execute_child  # type: ignore[attr-defined]
SIGNATURE = inspect.signature(EXECUTE)


class Forked(subprocess.Popen):
    """A Popen of `python -m MODULE ...` or `python SCRIPT.py ...`: the server forks it, and it is this process' child.

    The command is executed as usual if its environment changes a variable that libraries read while they are imported.
    """

    def _execute_child(self, *given: Any) -> None:
        values = SIGNATURE.bind(self, *given).arguments
        order = order_of(values)
        if order is None:
            EXECUTE(self, *given)
            return
        server = _server()
        with adopting():
            socket.send_fds(server, [json.dumps(order).encode()], pipes_of(values))
            self.pid = int(server.recv(64))
        created(self, values)


def run(command: list[Any], timeout: float = 600, **options: Any) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run(command, capture_output=True, text=True)`."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Forked([*map(str, command)], text=True, **streams | options) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
        return subprocess.CompletedProcess(command, process.returncode, output, errors)


def call(function: str, *arguments: object, **options: Any) -> Forked:
    """MODULE:FUNCTION of tests/ with arguments that JSON can say, in a forked process."""
    return Forked([sys.executable, "-m", f"tests:{function}", json.dumps(arguments)], **options)


# -- the parent's side -----------------------------------------------------------------------------
def order_of(values: dict[str, Any]) -> dict[str, Any] | None:
    """What a process that is forked has to become; None where it must be executed."""
    command, environment = [os.fspath(word) for word in values["args"]], dict(values["env"] or os.environ)
    prefix, words = parted(command)
    module, arguments = (words[1], words[2:]) if words[:1] == ["-m"] else ("".join(words[:1]), words[1:])
    same = early(environment) == early(BORN_WITH) and not values["shell"] and not values["pass_fds"]
    if not module.startswith("tests:") and not (same and (module.startswith(MODULES) or module.endswith(".py"))):
        return None
    return {
        "module": module, "arguments": arguments, "unbuffered": "-u" in command, "deaf": prefix[:1] == ["sh"],
        "network": prefix[3] if prefix[:1] == ["ip"] else "", "environment": environment,
        "folder": os.path.abspath(values["cwd"] or "."), "session": values["start_new_session"],
    }  # fmt: skip


def parted(command: list[str]) -> tuple[list[str], list[str]]:
    """What stands before Python (a shell that ignores SIGTERM, or `ip netns exec NAME`), and what Python runs."""
    if sys.executable not in command:
        return [], []
    place = command.index(sys.executable)
    words = command[place + 1 :]
    return command[:place], words[1:] if words[:1] == ["-u"] else words


def early(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}


def pipes_of(values: dict[str, Any]) -> list[int]:
    ends = (values["p2cread"], values["c2pwrite"], values["errwrite"])
    return [number if end == -1 else end for number, end in enumerate(ends)]


def created(process: Any, values: dict[str, Any]) -> None:
    process._child_created = True
    names = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
    process._close_pipe_fds(*(values[name] for name in names))


@contextlib.contextmanager
def adopting():
    """The server's grandchildren become this process' children, as soon as the process between has ended."""
    system = ctypes.CDLL(None)
    system.prctl(SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        system.prctl(SUBREAPER, 0, 0, 0, 0)


@functools.cache
def _server() -> socket.socket:
    """It ends with this process, when its end of the socket closes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment, handle = BORN_WITH | {"OMP_NUM_THREADS": "1"}, theirs.fileno()
    subprocess.Popen([sys.executable, SERVER, str(handle)], env=environment, pass_fds=[handle])
    theirs.close()
    assert ours.recv(64) == b"ready"
    return ours
