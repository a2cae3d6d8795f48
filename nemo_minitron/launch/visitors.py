"""Accepts connections at node 0's port. The job's nodes know its secret; anybody else is turned away."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Iterator

from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.launch.connection import SILENCE, Connection, ConnectionLost

VISITORS = 64  # connections that are greeted at a time


def listening(port: int) -> socket.socket:
    """A socket that listens at `port` on all addresses. Raises InputError if the port is taken."""
    try:
        return socket.create_server(("", port))  # a machine's own name may resolve to its loopback address
    except OSError as error:
        raise InputError(
            f"node 0 cannot listen at port {port}: {error.strerror}; give a free one with --rendezvous"
        ) from None


@contextlib.contextmanager
def visitors(server: socket.socket, secret: str) -> Iterator[queue.Queue[tuple[Connection, JsonObject]]]:
    """A queue of (connection, its first message) from machines that know the secret.

    A thread greets each connection, so one that sends nothing, or something else, makes nobody wait.
    """
    arrivals: queue.Queue[tuple[Connection, JsonObject]] = queue.Queue()
    room = threading.BoundedSemaphore(VISITORS)

    def greet(peer: socket.socket) -> None:
        try:
            connection = Connection(peer, secret, leads=True)
            try:
                arrivals.put((connection, connection.receive(SILENCE)))
            except (ConnectionLost, TimeoutError):
                connection.close()
        except ConnectionLost:
            pass
        finally:
            room.release()

    def accept() -> None:
        with contextlib.suppress(OSError):  # raised when the server is closed below
            while True:
                peer, _ = server.accept()
                if room.acquire(blocking=False):
                    threading.Thread(target=greet, args=(peer,), daemon=True).start()
                else:
                    peer.close()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield arrivals
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # ends `accept`
        thread.join(SILENCE)
        while not arrivals.empty():
            arrivals.get()[0].close()
