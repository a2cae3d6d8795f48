"""The server of `forked.py`, which has loaded NeMo, and what a process that is forked from it becomes.

`python forked_server.py SOCKET` reads one order after another. With each order come three files: the new process'
standard input, output and error. The answer is the number of the new process.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from forked import EXECUTE, SIGNATURE, created, order_of, pipes_of

NEW_NETWORK = 0x40000000  # setns: the file is a network namespace
PARENT_DEATH_SIGNAL = 1  # prctl: what this process gets when its parent ends


def serve(handle: int) -> None:
    """Loads the framework that builds models, and forks a process an order."""
    import gc

    from nemo_minitron.backend.versions import installed

    if installed("nemo_toolkit"):
        import nemo.collections.llm  # noqa: F401
    elif installed("megatron-bridge"):
        from nemo_minitron.hosts.bridge.load import load_training

        load_training()
    else:  # Megatron-core alone, for the tests of `backend`
        import nemo_minitron.backend as backend

        backend.setup()
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
