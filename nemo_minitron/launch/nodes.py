"""Which node of a job this machine is: options say it, or the variables of Slurm, SkyPilot or the user's launcher."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping

from nemo_minitron.errors import InputError
from nemo_minitron.launch.connection import SECRET
from nemo_minitron.settings.layout import Layout

PORT = 29400
SHORTEST = 16  # characters of the shortest secret
# (number of nodes, this node's number) in the environment. Slurm's variables of a step belong to srun; the batch script
# has others, and runs on one node.
VARIABLES = (
    ("SLURM_STEP_NUM_NODES", "SLURM_NODEID"), ("SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK"), ("NNODES", "NODE_RANK"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Nodes:
    """`count` machines run the same command. The one with rank 0 leads; the others find it at `host` and `port`. They
    recognise each other by `secret`."""

    count: int = 1
    rank: int = 0
    host: str = ""
    port: int = PORT
    secret: str = dataclasses.field(default="", repr=False)

    @classmethod
    def of(
        cls, count: int | None = None, rank: int | None = None, rendezvous: str | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> Nodes:  # fmt: skip
        """The nodes that --nodes, --node-rank and --rendezvous describe. The environment says what these do not.

        Raises InputError if this node has no rank, no place to meet or no secret, and if a launcher started this
        command once for each process instead of once for each node.
        """
        _check_once(environment)
        names = next((names for names in VARIABLES if names[0] in environment), ("", ""))
        count = _whole("--nodes", count, environment.get(names[0], "1"), least=1)
        if count == 1:
            return cls()
        if rank is None and names[1] not in environment:
            raise InputError(f"--nodes {count} needs this node's number; give --node-rank, 0 to {count - 1}")
        rank = _whole("--node-rank", rank, environment.get(names[1], ""), least=0)
        if rank >= count:
            raise InputError(f"--node-rank is {rank} of {count} nodes; the nearest legal rank is {count - 1}")
        return cls(count, rank, *_place(rendezvous, environment), _secret(environment))

    def check(self, layout: Layout) -> None:
        """Raises InputError if the layout's processes do not divide over the nodes."""
        if layout.processes % self.count:
            legal = [n for n in range(1, layout.processes + 1) if layout.processes % n == 0]
            raise InputError(
                f"the layout's {layout.processes} processes do not divide over {self.count} nodes; the nearest legal "
                f"number of nodes is {min(legal, key=lambda n: (abs(n - self.count), n))}"
            )

    def sharing(self, processes: int) -> int:
        """The number of nodes on which so many processes run. A stage may have fewer processes than the layout, and
        then it uses the most nodes over which they divide."""
        return max(n for n in range(1, self.count + 1) if processes % n == 0)


def _check_once(environment: Mapping[str, str]) -> None:
    """Raises InputError if a launcher started this command several times on a node. minitron starts the processes of a
    node itself."""
    if environment.get("SLURM_LOCALID", "0") != "0" and "SLURM_STEP_NUM_NODES" in environment:
        raise InputError("srun started minitron several times on this node; give srun --ntasks-per-node=1")
    if "TORCHELASTIC_RUN_ID" in environment:
        raise InputError("minitron starts torchrun itself; run it without torchrun, once on each node (--nodes)")


def _whole(option: str, given: int | None, text: str, least: int) -> int:
    """The option's value, or without one the value that the environment has as `text`."""
    if given is None and not text.isdecimal():
        raise InputError(f"the environment says '{text}' for {option}; it must be a whole number")
    value = int(text) if given is None else given
    if value < least:
        raise InputError(f"{option} is {value}; the nearest legal value is {least}")
    return value


def _secret(environment: Mapping[str, str]) -> str:
    """The text by which the nodes recognise each other. They need one because anybody can connect to a port."""
    secret = environment.get(SECRET, "")
    if len(secret) < SHORTEST:
        raise InputError(
            f"{SECRET} has {len(secret)} characters and must have {SHORTEST} or more; set it to the same text on all "
            "nodes, for example to the output of openssl rand -hex 16"
        )
    return secret


def _place(rendezvous: str | None, environment: Mapping[str, str]) -> tuple[str, int]:
    """(host, port) where node 0 listens: from --rendezvous, from MASTER_ADDR and MASTER_PORT, or the first node in the
    scheduler's list."""
    host, _, port = (rendezvous or "").rpartition(":") if ":" in (rendezvous or "") else (rendezvous, "", "")
    host = host or environment.get("MASTER_ADDR") or _first(environment)
    port = port or environment.get("MASTER_PORT") or str(_port(environment))
    if not host:
        raise InputError("the nodes have no place to meet; give --rendezvous HOST:PORT, an address of node 0")
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"the rendezvous has the port '{port}'; it must be 1 to 65535, for example {PORT}")
    return host, int(port)


def _first(environment: Mapping[str, str]) -> str:
    """The first node of the job. Slurm lists `gpu[007-010,012]`, which gives `gpu007`; SkyPilot lists addresses, one a
    line."""
    if "SLURM_STEP_NODELIST" in environment:
        parts = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?", environment["SLURM_STEP_NODELIST"])
        return "".join(part or "" for part in parts.groups()) if parts else ""
    return environment.get("SKYPILOT_NODE_IPS", "").partition("\n")[0]


def _port(environment: Mapping[str, str]) -> int:
    """A port that depends on Slurm's job, because two jobs may share a node."""
    job = environment.get("SLURM_JOB_ID", "")
    return 20_000 + int(job) % 10_000 if job.isdecimal() else PORT
