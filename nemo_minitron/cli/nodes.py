"""Options of commands that run on many nodes. Every node is started with the same command."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from nemo_minitron.launch.stall import VARIABLE
from nemo_minitron.schema import MACHINES, setting

if TYPE_CHECKING:
    from nemo_minitron.job import Layout


@dataclasses.dataclass(frozen=True)
class Machines:
    """The nodes of a job. `job`: plain values that say what the command does; they must be the same on all nodes."""

    nodes: Optional[int] = setting(
        None, "Number of nodes that run this command. Default: srun's variable.", panel=MACHINES
    )
    node_rank: Optional[int] = setting(None, "Number of this node, from 0. Default: srun's variable.", panel=MACHINES)
    rendezvous: Optional[str] = setting(None, "HOST:PORT of node 0. Default: MASTER_ADDR.", panel=MACHINES)
    job: object = None

    def run(self, layout: Layout, out: Path, command: Callable[[], object]) -> None:
        """Node 0 runs `command`; the other nodes start their processes of each of its stages. `out`: the result of the
        command, on storage that all nodes share. Raises InputError as `Nodes`, `lead` and `follow_leader` do."""
        from nemo_minitron.artifacts.files import digest_of
        from nemo_minitron.launch.machines import follow_leader, lead
        from nemo_minitron.launch.nodes import Nodes
        from nemo_minitron.launch.torchrun import run

        nodes = Nodes.of(self.nodes, self.node_rank, self.rendezvous)
        nodes.check(layout)
        if nodes.rank:
            follow_leader(nodes, digest_of(self.job), out, run)
            return
        with lead(nodes, digest_of(self.job), out):
            command()


def _set_stall(seconds: int) -> int:
    """Hands the limit on in the environment, which reaches the launcher and its workers."""
    os.environ[VARIABLE] = str(seconds)
    return seconds


_STALL = "Seconds without progress of any rank after which a stage is ended; 0: no limit."
Stall = Annotated[
    int,
    typer.Option("--stall-timeout", min=0, envvar=VARIABLE, callback=_set_stall, help=_STALL, rich_help_panel=MACHINES),
]
