"""Options of commands that run on many nodes: each is started with the same command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from nemo_minitron.job import Layout

Count = Annotated[Optional[int], typer.Option("--nodes", help="Hosts that run this command; as srun says it.")]
Rank = Annotated[Optional[int], typer.Option("--node-rank", help="Which of them this is, from 0; as srun says it.")]
Meeting = Annotated[Optional[str], typer.Option("--rendezvous", help="HOST:PORT of node 0; else MASTER_ADDR.")]


def on_nodes(
    given: tuple[Optional[int], Optional[int], Optional[str]], layout: Layout, job: Any, out: Path,
    command: Callable[[], object],
) -> None:  # fmt: skip
    """Node 0 does `command`; the others start their part of each stage in it. `job`: plain values, the same on all;
    `out`: what it makes, on storage that all nodes share. Raises InputError as `Nodes`, `lead` and `follow`."""
    from nemo_minitron.artifacts.files import digest_of
    from nemo_minitron.launch.machines import follow_leader, lead
    from nemo_minitron.launch.nodes import Nodes
    from nemo_minitron.launch.torchrun import run

    nodes = Nodes.of(*given)
    nodes.check(layout)
    if nodes.rank:
        follow_leader(nodes, digest_of(job), out, run)
        return
    with lead(nodes, digest_of(job), out):
        command()
