"""A connection between two hosts of a job: messages, and the news that the other end is gone."""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
from collections.abc import Callable
from typing import Any

SILENCE = 30  # seconds until a host that does not answer is gone


class Gone(Exception):
    """The other end of a line is."""


class Line:
    """JSON objects, a line each.

    When the process at the other end ends, its kernel closes the connection; where the host itself is gone, this
    one's kernel gives up on it after `SILENCE` seconds.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", SILENCE // 3), ("TCP_KEEPINTVL", SILENCE // 6), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):  # Linux's names
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE * 1000)
        self.connection, self.address = connection, connection.getpeername()[0]
        self._over = threading.Event()
        self._stop: Callable[[], None] = lambda: None
        self._heard: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError), self.connection.makefile() as file:
            for text in file:
                message = json.loads(text)
                failed = message.get("failed")
                self._heard.put(message)
                if failed:
                    self._alarm()
        self._heard.put(None)
        self._alarm()

    def _alarm(self) -> None:
        self._over.set()
        self._stop()

    def watch(self, stop: Callable[[], None]) -> None:
        """`stop` is called, in a thread, once the other end is gone or has failed; at once if it is already."""
        self._stop = stop
        if self._over.is_set():
            stop()

    def say(self, **message: Any) -> None:
        """Raises Gone."""
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            raise Gone from None

    def hear(self, seconds: float | None = None) -> dict[str, Any]:
        """The next message. Raises Gone, or TimeoutError where none comes in time."""
        try:
            message = self._heard.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None
        if message is None:
            self._heard.put(None)  # for whoever asks again
            raise Gone
        return message

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
