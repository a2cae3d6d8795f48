"""Who comes to node 0's port: the nodes of the job, which know its secret, and whoever else."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Iterator
from typing import Any

from nemo_minitron.errors import InputError
from nemo_minitron.launch.connection import SILENCE, Connection, ConnectionLost

VISITORS = 64  # that are met at a time


def listening(port: int) -> socket.socket:
    try:
        return socket.create_server(("", port))  # a host's own name may be its loopback address
    except OSError as error:
        raise InputError(
            f"node 0 cannot listen at port {port}: {error.strerror}; give a free one with --rendezvous"
        ) from None


@contextlib.contextmanager
def visitors(server: socket.socket, secret: str) -> Iterator[queue.Queue[tuple[Connection, dict[str, Any]]]]:
    """Those that know the secret, with what they say first. Each is met in a thread of its own, so many at a time: one
    that says nothing, or anything else, keeps nobody waiting."""
    found: queue.Queue[tuple[Connection, dict[str, Any]]] = queue.Queue()
    room = threading.BoundedSemaphore(VISITORS)

    def meet(connection: socket.socket) -> None:
        try:
            line = Connection(connection, secret, leads=True)
            try:
                found.put((line, line.receive(SILENCE)))
            except (ConnectionLost, TimeoutError):
                line.close()
        except ConnectionLost:
            pass
        finally:
            room.release()

    def accept() -> None:
        with contextlib.suppress(OSError):  # the server is closed once all are there
            while True:
                connection, _ = server.accept()
                if room.acquire(blocking=False):
                    threading.Thread(target=meet, args=(connection,), daemon=True).start()
                else:
                    connection.close()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # ends `accept`
        thread.join(SILENCE)
        while not found.empty():
            found.get()[0].close()
