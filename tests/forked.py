"""Commands in processes forked from one that has loaded NeMo: that takes longer than most of what tests let them do.

`Forked` is a `subprocess.Popen`. Each process of pytest has one server, this file run as a script, which loads NeMo
once. A command is forked from it instead of being executed, and so is every process that the command starts by
`python -m`: torchrun's agent, and its ranks. All else is as it was: one process is the other's child, with its own
session, environment, folder, pipes, arguments and exit code. Tests of signals (`test_signals.py`, `tests/launch`) and
the run that most tests of `tests/cli` look at execute their processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

MODULES = ("nemo_minitron.", "torch.distributed.run")  # what is run by `python -m`, and is forked
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "PYTHON", "LD_")  # begin names that libraries read early
BORN_WITH = dict(os.environ)  # before any test has changed it; the server's too
SUBREAPER = 36  # prctl: an orphan becomes the child of this process
NEW_NETWORK = 0x40000000  # setns: the file is a network namespace
PARENT_DEATH_SIGNAL = 1  # prctl: what this process gets when its parent ends
EXECUTE = subprocess.Popen._execute_child  # type: ignore[attr-defined]
SIGNATURE = inspect.signature(EXECUTE)


class Forked(subprocess.Popen):
    """`python -m MODULE ...` or `python SCRIPT.py ...`, forked from this process' server and yet its own child.

    It is executed like any other where its environment has another value that libraries read as they are imported.
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
    subprocess.Popen([sys.executable, __file__, str(handle)], env=environment, pass_fds=[handle])
    theirs.close()
    assert ours.recv(64) == b"ready"
    return ours


# -- the server ------------------------------------------------------------------------------------
def serve(handle: int) -> None:
    """Loads NeMo, and forks a process an order."""
    import gc

    import nemo.collections.llm  # noqa: F401

    gc.freeze()  # what was loaded stays: processes need not look through it
    client = socket.socket(fileno=handle)
    client.send(b"ready")
    while True:
        data, pipes, _, _ = socket.recv_fds(client, 1 << 20, 3)
        if not data:
            return
        client.send(str(fork(json.loads(data), pipes)).encode())
        for pipe in pipes:
            os.close(pipe)


def fork(order: dict[str, Any], pipes: list[int]) -> int:
    """The process of an order, an orphan."""
    reader, writer = os.pipe()
    between = os.fork()
    if not between:
        process = os.fork()
        if not process:
            become(order, pipes)
        os.write(writer, str(process).encode())
        os._exit(0)
    os.waitpid(between, 0)
    process = int(os.read(reader, 64))
    os.close(reader)
    os.close(writer)
    return process


# -- the forked process ----------------------------------------------------------------------------
def become(order: dict[str, Any], pipes: list[int]) -> NoReturn:
    """Does what a new Python would do with an order's command, and ends as it would."""
    code = 1
    try:
        begin(order, pipes)
        code = outcome(order)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def begin(order: dict[str, Any], pipes: list[int]) -> None:
    """Nothing of the parent's stays but the modules that it has loaded."""
    import gc

    gc.freeze()  # no file of the parent's is closed here: its number may be another file's by then
    begin_exit()
    if order["session"]:
        os.setsid()
    for number, pipe in enumerate([fcntl.fcntl(pipe, fcntl.F_DUPFD, 100) for pipe in pipes]):
        os.dup2(pipe, number)
    os.closerange(3, 4096)
    if order["network"]:
        with open(f"/var/run/netns/{order['network']}") as network:
            assert ctypes.CDLL(None).setns(network.fileno(), NEW_NETWORK) == 0
    begin_signals(order["deaf"])
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout.reconfigure(write_through=order["unbuffered"], line_buffering=os.isatty(1))
    here = str(Path(__file__).parent)
    sys.path[:] = [order["folder"], *[folder for folder in sys.path if folder not in ("", here, order.get("parent"))]]
    subprocess.Popen._execute_child = fork_from_here
    if "torch" in sys.modules and "OMP_NUM_THREADS" in os.environ:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def begin_exit() -> None:
    """What the parent has left for its own exit is not done at this one's; the libraries' hooks stay."""
    import atexit
    import logging
    import multiprocessing.util
    import weakref

    atexit._clear()
    multiprocessing.util._finalizer_registry.clear()
    weakref.finalize._registry.clear()
    for hook in (logging.shutdown, weakref.finalize._exitfunc, multiprocessing.util._exit_function):
        atexit.register(hook)


def begin_signals(deaf: bool) -> None:
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def outcome(order: dict[str, Any]) -> int:
    """The exit code of the command, after what it has left for its exit."""
    import atexit
    import threading

    try:
        perform(order["module"], order["arguments"])
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
    except Exception:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    return code


def perform(module: str, arguments: list[str]) -> None:
    import runpy
    import warnings

    if module.startswith("tests:"):
        file, _, function = module.removeprefix("tests:").partition(":")
        sys.path.insert(0, str(Path(__file__).parent))
        getattr(__import__(file), function)(*json.loads(arguments[0]))
        return
    if module.endswith(".worker"):
        fork_writers()
    warnings.filterwarnings("ignore", "'torch.distributed.run' found in sys.modules")
    sys.argv = [module, *arguments]
    if module.endswith(".py"):
        sys.path[0] = str(Path(module).parent.absolute())
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def fork_writers() -> None:
    """The process where Megatron's writers of checkpoints leave their results is forked, too: Megatron would start a
    new one, to load torch once more."""
    from multiprocessing import get_context
    from multiprocessing.managers import SyncManager

    from megatron.core.dist_checkpointing.strategies import filesystem_async

    manager = SyncManager(ctx=get_context("fork"))
    manager.start(end_with_parent)
    filesystem_async._results_queue = manager.Queue()


def end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def fork_from_here(self: Any, *given: Any) -> None:
    """`Popen._execute_child` in a forked process: what it starts by `python -m` is forked from it, as its child."""
    values = SIGNATURE.bind(self, *given).arguments
    order = order_of(values)
    if order is None:
        EXECUTE(self, *given)
        return
    order["parent"] = os.getcwd()
    pipes = pipes_of(values)
    sys.stdout.flush()
    sys.stderr.flush()
    self.pid = os.fork()
    if not self.pid:
        become(order, pipes)
    created(self, values)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
