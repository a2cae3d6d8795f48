"""Commands that run on many nodes: each is started with the same command."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from nemo_minitron.launch.stall import VARIABLE
from nemo_minitron.schema import MACHINES, setting

if TYPE_CHECKING:
    from nemo_minitron.job import Layout


@dataclasses.dataclass(frozen=True)
class Machines:
    """The hosts of a job. `job`: plain values that say what is done, the same on all of them."""

    nodes: Optional[int] = setting(None, "Hosts that run this command; as srun says it.", panel=MACHINES)
    node_rank: Optional[int] = setting(None, "Which of them this is, from 0; as srun says it.", panel=MACHINES)
    rendezvous: Optional[str] = setting(None, "HOST:PORT of node 0; else MASTER_ADDR.", panel=MACHINES)
    job: Any = None

    def run(self, layout: Layout, out: Path, command: Callable[[], object]) -> None:
        """Node 0 does `command`; the others start their part of each stage in it. `out`: what it makes, on storage
        that all nodes share. Raises InputError as `Nodes`, `lead` and `follow_leader`."""
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
    """For whatever starts processes; the environment reaches the workers too."""
    os.environ[VARIABLE] = str(seconds)
    return seconds


_STALL = "Seconds without progress of any rank until a stage is ended; 0: no limit."
Stall = Annotated[
    int,
    typer.Option("--stall-timeout", min=0, envvar=VARIABLE, callback=_set_stall, help=_STALL, rich_help_panel=MACHINES),
]
