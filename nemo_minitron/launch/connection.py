"""A connection between two machines of a job. It carries messages and says when the other end is gone."""

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

from nemo_minitron.artifacts.files import parse_json
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.artifacts.parse import anything, checked, mapped

SECRET = "MINITRON_SECRET"  # the environment variable with the text that only the nodes of a job know
SILENCE = 30  # seconds after which a machine that does not answer counts as gone
GREETING = 10  # seconds for the random bytes that begin a connection
WORD = 16  # the number of those bytes
FIRST = 1 << 16  # bytes of the longest first message, which may come from anybody
LONGEST = 1 << 24  # bytes of the longest message: an order has a stage's settings


class ConnectionLost(Exception):
    """The other end of a connection is gone, or does not know the secret."""


class Connection:
    """Sends and receives JSON objects, one a line, between two machines that know one secret.

    Each end first sends random bytes. Every later line begins with an HMAC-SHA256 of its number, its direction and its
    text; the key is made from the secret and both ends' random bytes. So nobody else can make, change or repeat a
    message. Anybody on the way can read the messages. The connection ends at the first line with a wrong HMAC.

    `leads`: whether this end is node 0.

    When the process at the other end ends, its kernel closes the connection. If the machine itself is gone, this
    machine's kernel gives up after `SILENCE` seconds. Raises ConnectionLost if the random bytes do not come in time.
    """

    def __init__(self, peer: socket.socket, secret: str, leads: bool) -> None:
        peer.settimeout(GREETING)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", SILENCE // 3), ("TCP_KEEPINTVL", SILENCE // 6), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):  # only Linux has these names
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE * 1000)
        self.leads, self._socket = leads, peer
        self._over = threading.Event()
        self._stop: Callable[[], None] = lambda: None
        self._received: queue.Queue[JsonObject | None] = queue.Queue()  # None: the other end is gone
        self._sent = 0
        try:
            self.address = peer.getpeername()[0]
            self._key = self._agree(secret)
            peer.settimeout(None)
        except OSError:
            peer.close()
            raise ConnectionLost from None
        threading.Thread(target=self._listen, daemon=True).start()

    def _agree(self, secret: str) -> bytes:
        """The key of this connection. Raises OSError if the other end's random bytes do not come in time."""
        ours, theirs = os.urandom(WORD), b""
        self._socket.sendall(ours)
        deadline = time.monotonic() + GREETING
        while len(theirs) < WORD:
            part = self._socket.recv(WORD - len(theirs))
            if not part or time.monotonic() > deadline:
                raise OSError
            theirs += part
        words = ours + theirs if self.leads else theirs + ours
        return hmac.digest(secret.encode(), words, "sha256")

    def _mark(self, leads: bool, number: int, text: bytes) -> bytes:
        """The HMAC of line `number` in one direction."""
        return hmac.new(self._key, b"%d %d " % (leads, number) + text, "sha256").hexdigest().encode()

    def _listen(self) -> None:
        """Queues what the other end sends, until it is gone or a line is not its own. It runs in a thread."""
        with contextlib.suppress(OSError, ValueError), self._socket.makefile("rb") as file:
            for number in itertools.count():
                mark, _, text = file.readline(LONGEST if number else FIRST).partition(b" ")
                if not text.endswith(b"\n") or not hmac.compare_digest(mark, self._mark(not self.leads, number, text)):
                    break
                message = checked(parse_json(text), mapped(anything()), "a message")
                self._received.put(message)
                if message.get("failed"):
                    self._alarm()
        self._received.put(None)
        self._alarm()

    def _alarm(self) -> None:
        """Ends what runs on this machine, because it cannot finish without the other one."""
        self._over.set()
        self._stop()

    def watch(self, stop: Callable[[], None]) -> None:
        """Calls `stop`, in a thread, when the other end is gone or has failed; at once if that has happened."""
        self._stop = stop
        if self._over.is_set():
            stop()

    def send(self, **message: object) -> None:
        """Sends one message. Raises ConnectionLost."""
        try:
            text = json.dumps(message).encode() + b"\n"
            self._socket.sendall(self._mark(self.leads, self._sent, text) + b" " + text)
            self._sent += 1
        except OSError:
            raise ConnectionLost from None

    def receive(self, seconds: float | None = None) -> JsonObject:
        """The next message. Raises ConnectionLost, or TimeoutError if no message comes within `seconds`."""
        try:
            message = self._received.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None
        if message is None:
            self._received.put(None)  # a later call must raise, too
            raise ConnectionLost
        return message

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
