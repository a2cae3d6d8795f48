"""Which node of a job this machine is: options and the variables of Slurm, SkyPilot and other launchers say it."""

import dataclasses

import pytest

from nemo_minitron.errors import InputError
from nemo_minitron.launch.connection import SECRET
from nemo_minitron.launch.nodes import Nodes
from nemo_minitron.settings.layout import Layout

WORD = "a secret of this test"
SLURM = {"SLURM_STEP_NUM_NODES": "4", "SLURM_NODEID": "2", "SLURM_STEP_NODELIST": "gpu[007-010]", "SLURM_LOCALID": "0"}
SKY = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5"}


@pytest.mark.parametrize(
    ("given", "environment", "nodes"),
    [
        ({}, {}, Nodes()),
        ({}, {"SLURM_NNODES": "4", "SLURM_NODEID": "0"}, Nodes()),  # a batch script's body, outside of srun
        ({}, SLURM | {"SLURM_STEP_NUM_NODES": "1"}, Nodes()),
        ({}, SLURM | {"SLURM_JOB_ID": "1230042"}, Nodes(4, 2, "gpu007", 20042)),
        ({}, SLURM | {"SLURM_STEP_NODELIST": "a1,b[2-3]"}, Nodes(4, 2, "a1", 29400)),
        ({}, SLURM | {"SLURM_STEP_NODELIST": "r1-n[3,5]-ib,x"}, Nodes(4, 2, "r1-n3-ib", 29400)),
        ({}, SLURM | {"MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "7000"}, Nodes(4, 2, "10.1.1.1", 7000)),
        ({}, SKY, Nodes(2, 1, "10.0.0.4", 29400)),
        ({}, {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "h"}, Nodes(2, 0, "h", 29400)),
        ({"count": 2, "rank": 1, "rendezvous": "h:81"}, {}, Nodes(2, 1, "h", 81)),
        ({"count": 2, "rank": 1, "rendezvous": "h"}, SLURM, Nodes(2, 1, "h", 29400)),
        ({"count": 1}, SLURM, Nodes()),
    ],
)
def test_this_node(given, environment, nodes):
    found = Nodes.of(**given, environment=environment | {SECRET: WORD})
    assert found == dataclasses.replace(nodes, secret=WORD if nodes.count > 1 else "")
    assert WORD not in repr(found)


@pytest.mark.parametrize(
    ("given", "environment", "words"),
    [
        ({"count": 0}, {}, "--nodes is 0; the nearest legal value is 1"),
        ({"count": 2}, {}, "give --node-rank, 0 to 1"),
        ({"count": 2, "rank": 2}, {}, "nearest legal rank is 1"),
        ({"count": 2, "rank": 0}, {}, "give --rendezvous HOST:PORT"),
        ({"count": 2, "rank": 0, "rendezvous": "h:ssh"}, {}, "port 'ssh'"),
        ({}, {"NNODES": "two", "NODE_RANK": "0"}, "'two' for --nodes"),
        ({}, SLURM | {"SLURM_LOCALID": "3"}, "--ntasks-per-node=1"),
        ({}, {"TORCHELASTIC_RUN_ID": "1"}, "starts torchrun itself"),
    ],
)
def test_refusals(given, environment, words):
    with pytest.raises(InputError, match=words):
        Nodes.of(**given, environment=environment | {SECRET: WORD})


@pytest.mark.parametrize("said", [{}, {SECRET: ""}, {SECRET: "short"}])
def test_nodes_need_a_secret(said):
    with pytest.raises(InputError, match=rf"MINITRON_SECRET has {len(said.get(SECRET, ''))} characters"):
        Nodes.of(environment=SKY | said)


def test_processes_divide_over_nodes():
    Nodes(2).check(Layout(tp=2, dp=2))
    with pytest.raises(InputError, match=r"6 processes do not divide over 4 nodes.*number of nodes is 3"):
        Nodes(4).check(Layout(tp=3, dp=2))
    assert [Nodes(4).sharing(n) for n in (1, 2, 3, 6, 8)] == [1, 2, 3, 3, 4]
