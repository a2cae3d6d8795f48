"""Which host of a job this is: by options, or as Slurm, SkyPilot or the user's launcher say it."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping

from nemo_minitron.errors import InputError
from nemo_minitron.launch.connection import SECRET
from nemo_minitron.settings.layout import Layout

PORT = 29400
SHORTEST = 16  # characters of the secret
SAID = (  # how many nodes there are, and which of them this is; Slurm's are of a step: srun's, not the batch script's
    ("SLURM_STEP_NUM_NODES", "SLURM_NODEID"), ("SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK"), ("NNODES", "NODE_RANK"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Nodes:
    """`count` hosts run the same command; the one of rank 0 leads, and the others find it at `host` and `port`, and
    know each other by `secret`."""

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
        """From --nodes, --node-rank and --rendezvous, and what is not given from the environment.

        Raises InputError for a host that has no rank or no place to meet, and where a launcher started this command
        once for each process.
        """
        _check_once(environment)
        names = next((names for names in SAID if names[0] in environment), ("", ""))
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
        """Raises InputError for a layout whose processes do not divide over the nodes."""
        if layout.processes % self.count:
            legal = [n for n in range(1, layout.processes + 1) if layout.processes % n == 0]
            raise InputError(
                f"the layout's {layout.processes} processes do not divide over {self.count} nodes; the nearest legal "
                f"number of nodes is {min(legal, key=lambda n: (abs(n - self.count), n))}"
            )

    def sharing(self, processes: int) -> int:
        """How many of the nodes so many processes are spread over: a stage may have fewer than the layout."""
        return max(n for n in range(1, self.count + 1) if processes % n == 0)


def _check_once(environment: Mapping[str, str]) -> None:
    """minitron starts the processes of a node itself."""
    if environment.get("SLURM_LOCALID", "0") != "0" and "SLURM_STEP_NUM_NODES" in environment:
        raise InputError("srun started minitron several times on this node; give srun --ntasks-per-node=1")
    if "TORCHELASTIC_RUN_ID" in environment:
        raise InputError("minitron starts torchrun itself; run it without torchrun, once on each node (--nodes)")


def _whole(option: str, given: int | None, said: str, least: int) -> int:
    if given is None and not said.isdecimal():
        raise InputError(f"the environment says '{said}' for {option}; it must be a whole number")
    value = int(said) if given is None else given
    if value < least:
        raise InputError(f"{option} is {value}; the nearest legal value is {least}")
    return value


def _secret(environment: Mapping[str, str]) -> str:
    """What the nodes know each other by; anybody may connect to a port."""
    secret = environment.get(SECRET, "")
    if len(secret) < SHORTEST:
        raise InputError(
            f"the nodes know each other by {SECRET}, which has {len(secret)} characters here; set it to the same "
            f"{SHORTEST} or more on all of them, for example to what openssl rand -hex 16 gives"
        )
    return secret


def _place(rendezvous: str | None, environment: Mapping[str, str]) -> tuple[str, int]:
    """Where node 0 listens: --rendezvous, MASTER_ADDR and MASTER_PORT, or the first node of the job's own list."""
    host, _, port = (rendezvous or "").rpartition(":") if ":" in (rendezvous or "") else (rendezvous, "", "")
    host = host or environment.get("MASTER_ADDR") or _first(environment)
    port = port or environment.get("MASTER_PORT") or str(_port(environment))
    if not host:
        raise InputError("the nodes have no place to meet; give --rendezvous HOST:PORT, an address of node 0")
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"the port '{port}' of the rendezvous is none; it must be 1 to 65535, for example {PORT}")
    return host, int(port)


def _first(environment: Mapping[str, str]) -> str:
    """`gpu[007-010,012]` -> `gpu007`; SkyPilot gives addresses, a line each."""
    if "SLURM_STEP_NODELIST" in environment:
        found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?", environment["SLURM_STEP_NODELIST"])
        return "".join(part or "" for part in found.groups()) if found else ""
    return environment.get("SKYPILOT_NODE_IPS", "").partition("\n")[0]


def _port(environment: Mapping[str, str]) -> int:
    """Another one for each of Slurm's jobs: two of them may share a node."""
    job = environment.get("SLURM_JOB_ID", "")
    return 20_000 + int(job) % 10_000 if job.isdecimal() else PORT
