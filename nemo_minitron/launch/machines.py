"""The machines of one job, its nodes. Node 0 runs the stages one after the other and tells the others what to start;
they start their part of it."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path

from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.errors import DivergedError, InputError
from nemo_minitron.launch.connection import SECRET, SILENCE, Connection, ConnectionLost
from nemo_minitron.launch.nodes import Nodes
from nemo_minitron.launch.visitors import listening, visitors

MEETING = 600  # seconds that node 0 waits for the next node, which may still be pulling its container
LAST_WORDS = 5  # seconds that node 0 waits for the other nodes' results of a stage that has failed here
STOPPED = 128 + signal.SIGTERM  # the exit code of processes that somebody told to stop
AGAIN = "run the same command on all nodes again and the job resumes from what was saved"


@dataclasses.dataclass(frozen=True)
class StageOrder:
    """The processes of a stage: `each` of them on each of `nodes` machines. torchrun's agents meet at `host`:`port`.

    `order`: what the processes are told (`settings.orders`), as plain values, because it travels between machines as
    JSON. `worker`: the module that reads it. `log`: the path of the log, empty for none.
    """

    stage: str
    worker: str
    order: JsonObject
    each: int
    nodes: int = 1
    host: str = ""
    port: int = 0
    log: str = ""


@dataclasses.dataclass(frozen=True)
class StageResult:
    """How the processes of a stage ended on one machine. `refusal`: the sentence of an InputError, empty for none;
    `cause`: what failed first; `log`: the path of the log."""

    code: int
    refusal: str = ""
    cause: str = ""
    log: str = ""

    def check(self, stage: str, where: str = "") -> None:
        """Raises InputError for a refusal, DivergedError for a training that diverged, and RuntimeError for any other
        failure. `where`: words that name the machine."""
        if self.refusal:
            raise InputError(self.refusal)
        if self.code:
            log = f"; all of it is in {self.log}" if self.log else ""
            # A worker reports the class of its error before the sentence.
            kind = DivergedError if f"{DivergedError.__name__}: " in self.cause else RuntimeError
            if self.code == STOPPED and not self.cause.startswith("rank "):
                raise kind(f"{stage} was told to stop{where} (SIGTERM); run the same command again{log}")
            raise kind(f"{stage} ended with exit code {self.code}{where}: {self.cause}{log}")


# (order, this node's rank, watch) -> the result. `watch(stop)` has `stop` called when another machine has failed.
Work = Callable[[StageOrder, int, Callable[[Callable[[], None]], None]], StageResult]
_leading: ContextVar[Leader | None] = ContextVar("leading", default=None)


class Leader:
    """Node 0 and its connections to the other nodes, in the order of their ranks."""

    def __init__(self, nodes: Nodes, connections: list[Connection]) -> None:
        self.nodes, self.connections = nodes, connections

    def run(self, order: StageOrder, work: Work) -> None:
        """Runs an order, of `order.each` processes in all, on as many machines as can share it.

        Raises as `StageResult.check`, and RuntimeError if a machine is gone.
        """
        processes = order.each
        count = self.nodes.sharing(processes)
        order = dataclasses.replace(
            order, each=processes // count, nodes=count, host=self.nodes.host, port=free_port()
        )  # fmt: skip
        connections = dict(enumerate(self.connections[: count - 1], 1))
        for rank, connection in connections.items():
            self._send(rank, connection, order=dataclasses.asdict(order))
        here = work(order, 0, lambda stop: _watch(list(connections.values()), stop))
        others = {rank: self._result(rank, connection, here) for rank, connection in connections.items()}
        # A refusal says what to change. It comes before the failures, which may only follow from it.
        for result in (here, *others.values()):
            if result.refusal:
                result.check(order.stage)
        here.check(order.stage)
        for rank, result in others.items():
            result.check(order.stage, f" on node {rank}")

    def _send(self, rank: int, connection: Connection, **message: object) -> None:
        try:
            connection.send(**message)
        except ConnectionLost:
            raise RuntimeError(_gone(f"node {rank}", connection)) from None

    def _result(self, rank: int, connection: Connection, here: StageResult) -> StageResult:
        """The result of another machine. If this one failed, do not wait for it: it will be told to end."""
        try:
            return StageResult(**connection.receive(LAST_WORDS if here.code else None)["result"])
        except TimeoutError:
            return StageResult(0)
        except ConnectionLost:
            raise RuntimeError(_gone(f"node {rank}", connection)) from None


def _gone(node: str, connection: Connection) -> str:
    return f"{node} ({connection.address}) is gone: its minitron has ended, or the machine itself; {AGAIN}"


def _watch(connections: list[Connection], stop: Callable[[], None]) -> None:
    for connection in connections:
        connection.watch(stop)


def free_port() -> int:
    """A port that is free now. Each stage gets a new one, because the last stage's port may not be free yet."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def leading() -> Leader | None:
    """The machines that this process leads. None if the job has one machine."""
    return _leading.get()


@contextlib.contextmanager
def lead(nodes: Nodes, identity: str, out: Path) -> Iterator[None]:
    """Waits for the other nodes. In the block, `launch` starts a stage's processes on all of them.

    `identity`: a digest of the job. `out`: the file or folder that the job makes, on storage that all nodes share.

    Raises InputError if a node runs another job or does not see that storage, and RuntimeError if a node does not come.
    """
    if nodes.count == 1:
        yield
        return
    connections = _meet(nodes, identity, out)
    token = _leading.set(Leader(nodes, [connections[rank] for rank in sorted(connections)]))
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
        _dismiss(connections.values(), reason)


def _shared(out: Path) -> Path:
    """The file by which the nodes check that they share storage: node 0 writes it and the others must see it."""
    return out.parent / f".{out.name}.nodes"


def _meet(nodes: Nodes, identity: str, out: Path) -> dict[int, Connection]:
    """Node 0's connections to the other nodes, by their ranks, once all of them have come."""
    word = secrets.token_hex(8)
    out.parent.mkdir(parents=True, exist_ok=True)
    _shared(out).write_text(word)
    admitted: dict[int, Connection] = {}
    print(f"node 0 waits for {nodes.count - 1} more at {nodes.host}:{nodes.port}", flush=True)
    with listening(nodes.port) as server, visitors(server, nodes.secret) as arrivals:
        try:
            while len(admitted) < nodes.count - 1:
                _admit(arrivals.get(timeout=MEETING), nodes, identity, word, admitted)
        except queue.Empty:
            missing = ", ".join(str(rank) for rank in range(1, nodes.count) if rank not in admitted)
            _dismiss(admitted.values(), f"node {missing} did not come")
            where = f"{nodes.host}:{nodes.port} within {MEETING} s of the node before"
            raise RuntimeError(f"node {missing} did not come to {where}") from None
        except InputError as error:
            _dismiss(admitted.values(), str(error))
            raise
    print(f"all {nodes.count} nodes have come", flush=True)
    return admitted


def _dismiss(connections: Iterable[Connection], reason: str) -> None:
    """Tells the other nodes that the job is done, or why it has failed."""
    for connection in connections:
        with contextlib.suppress(ConnectionLost):
            connection.send(end=reason, failed=bool(reason))
        connection.close()


def _admit(
    arrival: tuple[Connection, JsonObject], nodes: Nodes, identity: str, word: str, admitted: dict[int, Connection]
) -> None:
    """Adds a node that has come to `admitted`. The connection of anybody else is closed.

    Raises InputError for a node of another job, one that does not share storage, or a second one with the same rank.
    The job cannot go on then, and both ends say why.
    """
    connection, hello = arrival
    try:
        rank, same = hello["node"], hello["identity"] == identity
        if type(rank) is not int or not 0 < rank < nodes.count:
            raise KeyError
        connection.send(word=word, same=same)
        sees = same and connection.receive(2 * SILENCE)["sees"]
    except (ConnectionLost, TimeoutError, KeyError):
        connection.close()
        return
    if same and sees and rank not in admitted:
        admitted[rank] = connection
        return
    connection.close()
    if rank in admitted:
        raise InputError(f"two machines say that they are node {rank}; give each its own --node-rank")
    raise InputError(_another(rank) if not same else _unseen(rank))


def _another(rank: int) -> str:
    return f"node {rank} runs another job than node 0; give all nodes the same command"


def _unseen(rank: int) -> str:
    return f"node {rank} does not see what node 0 writes; put --out on storage that all nodes share"


def follow_leader(nodes: Nodes, identity: str, out: Path, work: Work) -> None:
    """Runs a node that is not the first: it does what node 0 orders until the job is done. Arguments as for `lead`;
    `work` runs this machine's processes of an order.

    Raises InputError if this node runs another job or does not see the shared storage, and RuntimeError if node 0 is
    not found, is gone or has failed.
    """
    connection = _find(nodes)
    try:
        connection.send(node=nodes.rank, identity=identity)
        hello = _answer(connection)
        if not hello["same"]:
            raise InputError(_another(nodes.rank))
        sees = _sees(_shared(out), hello["word"])
        connection.send(sees=sees)
        if not sees:
            raise InputError(_unseen(nodes.rank))
        print(f"node {nodes.rank} of {nodes.count}, led by {nodes.host}:{nodes.port}", flush=True)
        while "order" in (message := connection.receive()):
            order = StageOrder(**message["order"])
            result = work(order, nodes.rank, lambda stop: _watch([connection], stop))
            connection.send(result=dataclasses.asdict(result), failed=bool(result.code))
        if message["end"]:
            raise RuntimeError(f"{message['end']}; {AGAIN}")
    except ConnectionLost:
        raise RuntimeError(_gone("node 0", connection)) from None
    finally:
        connection.close()


def _answer(connection: Connection) -> JsonObject:
    """Node 0's first message. It answers only machines that know the secret."""
    try:
        return connection.receive()
    except ConnectionLost:
        why = f"it is gone, or has another {SECRET}; give all nodes the same one"
        raise RuntimeError(f"node 0 ({connection.address}) does not answer: {why}") from None


def _find(nodes: Nodes) -> Connection:
    """A connection to node 0. It tries again for `MEETING` seconds, because node 0 may start later."""
    deadline = time.monotonic() + MEETING
    while True:
        try:
            peer = socket.create_connection((nodes.host, nodes.port), timeout=SILENCE)
            return Connection(peer, nodes.secret, leads=False)
        except (OSError, ConnectionLost) as error:
            if time.monotonic() > deadline:
                where = f"{nodes.host}:{nodes.port} within {MEETING} s"
                raise RuntimeError(f"node 0 was not found at {where}: {error}") from None
        time.sleep(0.5)


def _sees(file: Path, word: str) -> bool:
    """Whether the file exists and holds this word. A network's file system may show it late."""
    deadline = time.monotonic() + SILENCE
    while time.monotonic() < deadline:
        if file.is_file() and file.read_text() == word:
            return True
        time.sleep(0.2)
    return False
