"""A connection between two hosts of a job: messages, and the news that the other end is gone."""

from __future__ import annotations

import contextlib
import hmac
import itertools
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from nemo_minitron.artifacts.files import parse_json
from nemo_minitron.artifacts.parse import anything, checked, mapped

SECRET = "MINITRON_SECRET"  # the variable with what all nodes of a job know, and nobody else
SILENCE = 30  # seconds until a host that does not answer is gone
GREETING = 10  # seconds for the word that begins a connection
WORD = 16  # bytes of it
FIRST = 1 << 16  # bytes of the first message, which may be anybody's
LONGEST = 1 << 24  # bytes of a message: an order has a stage's settings


class ConnectionLost(Exception):
    """The other end of a line is."""


class Connection:
    """JSON objects, a line each, between two that know one secret: whoever does not is not heard, and is gone.

    Each end first says a word of chance; every line then begins with an HMAC-SHA256 of its number, its direction and
    its text, under a key of the secret and both words. So nothing can be told, changed or said again by another. What
    is said can be read on the way. `leads`: whether this end is node 0.

    When the process at the other end ends, its kernel closes the connection; where the host itself is gone, this
    one's kernel gives up on it after `SILENCE` seconds. Raises ConnectionLost where the other end says no word in time.
    """

    def __init__(self, connection: socket.socket, secret: str, leads: bool) -> None:
        connection.settimeout(GREETING)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", SILENCE // 3), ("TCP_KEEPINTVL", SILENCE // 6), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):  # Linux's names
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE * 1000)
        self.connection, self.leads = connection, leads
        self._over = threading.Event()
        self._stop: Callable[[], None] = lambda: None
        self._heard: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._said = 0
        try:
            self.address = connection.getpeername()[0]
            self._key = self._agree(secret)
            connection.settimeout(None)
        except OSError:
            connection.close()
            raise ConnectionLost from None
        threading.Thread(target=self._listen, daemon=True).start()

    def _agree(self, secret: str) -> bytes:
        """The key of this connection."""
        own, other = os.urandom(WORD), b""
        self.connection.sendall(own)
        deadline = time.monotonic() + GREETING
        while len(other) < WORD:
            part = self.connection.recv(WORD - len(other))
            if not part or time.monotonic() > deadline:
                raise OSError
            other += part
        words = own + other if self.leads else other + own
        return hmac.digest(secret.encode(), words, "sha256")

    def _mark(self, leads: bool, number: int, text: bytes) -> bytes:
        return hmac.new(self._key, b"%d %d " % (leads, number) + text, "sha256").hexdigest().encode()

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError), self.connection.makefile("rb") as file:
            for number in itertools.count():
                mark, _, text = file.readline(LONGEST if number else FIRST).partition(b" ")
                if not text.endswith(b"\n") or not hmac.compare_digest(mark, self._mark(not self.leads, number, text)):
                    break
                message = checked(parse_json(text), mapped(anything()), "a message")
                self._heard.put(message)
                if message.get("failed"):
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

    def send(self, **message: object) -> None:
        """Raises ConnectionLost."""
        try:
            text = json.dumps(message).encode() + b"\n"
            self.connection.sendall(self._mark(self.leads, self._said, text) + b" " + text)
            self._said += 1
        except OSError:
            raise ConnectionLost from None

    def receive(self, seconds: float | None = None) -> dict[str, Any]:
        """The next message. Raises ConnectionLost, or TimeoutError where none comes in time."""
        try:
            message = self._heard.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None
        if message is None:
            self._heard.put(None)  # for whoever asks again
            raise ConnectionLost
        return message

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
