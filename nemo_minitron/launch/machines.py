"""The hosts of one job: node 0 goes through the stages and says what to start, the others start their part of it."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from nemo_minitron.errors import DivergedError, InputError
from nemo_minitron.launch.connection import SECRET, SILENCE, Connection, ConnectionLost
from nemo_minitron.launch.nodes import Nodes
from nemo_minitron.launch.visitors import listening, visitors

MEETING = 600  # seconds for all nodes to come: containers are still being pulled
LAST_WORDS = 5  # seconds for the others to say how a stage that failed here ended there
AGAIN = "run the same command on all nodes again and it goes on from what was saved"


@dataclasses.dataclass(frozen=True)
class StageOrder:
    """A stage's processes: `each` of them on every one of `nodes` hosts, which meet at `host` and `port`. `order`: what
    they are told (`settings.orders`), as the plain values that travel between hosts; `worker`: the module that reads
    them."""

    stage: str
    worker: str
    order: dict[str, Any]
    each: int
    nodes: int = 1
    host: str = ""
    port: int = 0
    log: str = ""


@dataclasses.dataclass(frozen=True)
class StageResult:
    """How a host's processes of a stage ended: exit code, a refusal's sentence, what failed first, the log."""

    code: int
    refusal: str = ""
    cause: str = ""
    log: str = ""

    def check(self, stage: str, where: str = "") -> None:
        """Raises InputError for a refusal, DivergedError for a training that diverged, RuntimeError for any other
        failure."""
        if self.refusal:
            raise InputError(self.refusal)
        if self.code:
            log = f"; all of it is in {self.log}" if self.log else ""
            kind = DivergedError if f"{DivergedError.__name__}: " in self.cause else RuntimeError  # behind its rank
            raise kind(f"{stage} ended with exit code {self.code}{where}: {self.cause}{log}")


Work = Callable[[StageOrder, int, Callable[[Callable[[], None]], None]], StageResult]  # (order, node, watch) -> its end
_leading: ContextVar[Leader | None] = ContextVar("leading", default=None)


class Leader:
    """Node 0 and its lines to the others, in their order."""

    def __init__(self, nodes: Nodes, lines: list[Connection]) -> None:
        self.nodes, self.lines = nodes, lines

    def run(self, order: StageOrder, work: Work) -> None:
        """Does an order on all hosts that share it. Raises as `StageResult.check`, and where a host is gone."""
        processes = order.each
        count = self.nodes.sharing(processes)
        order = dataclasses.replace(
            order, each=processes // count, nodes=count, host=self.nodes.host, port=_free_port()
        )  # fmt: skip
        lines = dict(enumerate(self.lines[: count - 1], 1))
        for rank, line in lines.items():
            self._to(rank, line, order=dataclasses.asdict(order))
        ended = work(order, 0, lambda stop: _watch(list(lines.values()), stop))
        endings = {rank: self._ending(rank, line, ended) for rank, line in lines.items()}
        for ending in (ended, *endings.values()):
            if ending.refusal:
                ending.check(order.stage)
        ended.check(order.stage)
        for rank, ending in endings.items():
            ending.check(order.stage, f" on node {rank}")

    def _to(self, rank: int, line: Connection, **message: object) -> None:
        try:
            line.send(**message)
        except ConnectionLost:
            raise RuntimeError(_gone(rank, line)) from None

    def _ending(self, rank: int, line: Connection, own: StageResult) -> StageResult:
        """Of another host; where this one failed the other is not waited for, it is told to end."""
        try:
            return StageResult(**line.receive(LAST_WORDS if own.code else None)["ending"])
        except TimeoutError:
            return StageResult(0)
        except ConnectionLost:
            raise RuntimeError(_gone(rank, line)) from None


def _gone(rank: int, line: Connection) -> str:
    return f"node {rank} ({line.address}) is gone, its minitron or the host itself; {AGAIN}"


def _watch(lines: list[Connection], stop: Callable[[], None]) -> None:
    for line in lines:
        line.watch(stop)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def leading() -> Leader | None:
    """The hosts that this process leads; None where it is alone."""
    return _leading.get()


@contextlib.contextmanager
def lead(nodes: Nodes, identity: str, out: Path) -> Iterator[None]:
    """Waits for the other nodes; within, `launch` starts a stage's processes on all of them.

    `identity`: a digest of the job; `out`: the file or folder that it makes, on storage that all nodes share. Raises
    InputError where a node runs another job or does not see that storage, RuntimeError where one does not come.
    """
    if nodes.count == 1:
        yield
        return
    lines = _meet(nodes, identity, out)
    token = _leading.set(Leader(nodes, [lines[rank] for rank in sorted(lines)]))
    reason = "node 0 was interrupted"
    try:
        yield
        reason = ""
    except Exception as error:
        reason = f"node 0 ended: {error}"
        raise
    finally:
        _leading.reset(token)
        _shared(out).unlink(missing_ok=True)
        _dismiss(lines.values(), reason)


def _shared(out: Path) -> Path:
    """What node 0 writes there, the others must see."""
    return out.parent / f".{out.name}.nodes"


def _meet(nodes: Nodes, identity: str, out: Path) -> dict[int, Connection]:
    word = secrets.token_hex(8)
    out.parent.mkdir(parents=True, exist_ok=True)
    _shared(out).write_text(word)
    lines: dict[int, Connection] = {}
    print(f"node 0 waits for {nodes.count - 1} more at {nodes.host}:{nodes.port}", flush=True)
    with listening(nodes.port) as server, visitors(server, nodes.secret) as found:
        try:
            while len(lines) < nodes.count - 1:
                _admit(found.get(timeout=MEETING), nodes, identity, word, lines)
        except queue.Empty:
            missing = ", ".join(str(rank) for rank in range(1, nodes.count) if rank not in lines)
            _dismiss(lines.values(), f"node {missing} did not come")
            where = f"{nodes.host}:{nodes.port} within {MEETING} s of the one before"
            raise RuntimeError(f"node {missing} did not come to {where}") from None
        except InputError as error:
            _dismiss(lines.values(), str(error))
            raise
    print(f"all {nodes.count} nodes are there", flush=True)
    return lines


def _dismiss(lines: Iterable[Connection], reason: str) -> None:
    """Tells the others that the job is done, or why it ends."""
    for line in lines:
        with contextlib.suppress(ConnectionLost):
            line.send(end=reason, failed=bool(reason))
        line.close()


def _admit(
    visitor: tuple[Connection, dict[str, Any]], nodes: Nodes, identity: str, word: str, lines: dict[int, Connection]
) -> None:
    """A visitor that is no node of ours is let go; a node of another job ends this one, with a reason on both."""
    line, hello = visitor
    try:
        rank, same = hello["node"], hello["identity"] == identity
        if type(rank) is not int or not 0 < rank < nodes.count:
            raise KeyError
        line.send(word=word, same=same)
        sees = same and line.receive(2 * SILENCE)["sees"]
    except (ConnectionLost, TimeoutError, KeyError):
        line.close()
        return
    if same and sees and rank not in lines:
        lines[rank] = line
        return
    line.close()
    if rank in lines:
        raise InputError(f"two hosts say that they are node {rank}; give each its own --node-rank")
    raise InputError(_another(rank) if not same else _unseen(rank))


def _another(rank: int) -> str:
    return f"node {rank} runs another job than node 0; give all nodes the same command"


def _unseen(rank: int) -> str:
    return f"node {rank} does not see what node 0 writes; put --out on storage that all nodes share"


def follow_leader(nodes: Nodes, identity: str, out: Path, work: Work) -> None:
    """A node that is not the first: does what node 0 orders until the job is done. Raises as `lead`."""
    line = _find(nodes)
    try:
        line.send(node=nodes.rank, identity=identity)
        hello = _answer(line)
        if not hello["same"]:
            raise InputError(_another(nodes.rank))
        sees = _sees(_shared(out), hello["word"])
        line.send(sees=sees)
        if not sees:
            raise InputError(_unseen(nodes.rank))
        print(f"node {nodes.rank} of {nodes.count}, led by {nodes.host}:{nodes.port}", flush=True)
        while "order" in (message := line.receive()):
            order = StageOrder(**message["order"])
            ending = work(order, nodes.rank, lambda stop: _watch([line], stop))
            line.send(ending=dataclasses.asdict(ending), failed=bool(ending.code))
        if message["end"]:
            raise RuntimeError(f"{message['end']}; {AGAIN}")
    except ConnectionLost:
        raise RuntimeError(f"node 0 ({line.address}) is gone, its minitron or the host itself; {AGAIN}") from None
    finally:
        line.close()


def _answer(line: Connection) -> dict[str, Any]:
    try:
        return line.receive()
    except ConnectionLost:
        why = f"it is gone, or has another {SECRET}; give all nodes the same one"
        raise RuntimeError(f"node 0 ({line.address}) does not answer: {why}") from None


def _find(nodes: Nodes) -> Connection:
    deadline = time.monotonic() + MEETING
    while True:
        try:
            connection = socket.create_connection((nodes.host, nodes.port), timeout=SILENCE)
            return Connection(connection, nodes.secret, leads=False)
        except (OSError, ConnectionLost) as error:
            if time.monotonic() > deadline:
                where = f"{nodes.host}:{nodes.port} within {MEETING} s"
                raise RuntimeError(f"node 0 is not to be found at {where}: {error}") from None
        time.sleep(0.5)


def _sees(file: Path, word: str) -> bool:
    """Whether the file is there, with this word; a network's file system may show it late."""
    deadline = time.monotonic() + SILENCE
    while time.monotonic() < deadline:
        if file.is_file() and file.read_text() == word:
            return True
        time.sleep(0.2)
    return False
