"""Weights and activations of a rank against bare Megatron, in four processes: see costs_worker.py."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks
from tolerances import ACTIVATIONS_REFERENCE

WORKER = Path(__file__).parent / "costs_worker.py"
CASES = {
    "tp-pp": {"kind": "llama", "layout": {"tp": 2, "pp": 2}},
    "tp-pp-tied": {"kind": "llama", "layout": {"tp": 2, "pp": 2}, "tied": True},
    "virtual": {"kind": "nemotron", "layout": {"pp": 2, "vp": 2, "dp": 2}},
    "sp": {"kind": "qk_norm", "layout": {"tp": 4, "sp": True}},
    "tp": {"kind": "llama", "layout": {"tp": 2, "dp": 2}},
    "plain": {"kind": "nemotron", "layout": {"dp": 4}},
    "dense": {"kind": "llama", "layout": {"dp": 4}},
    "experts": {"kind": "moe", "layout": {"tp": 2, "dp": 2, "ep": 2, "etp": 1, "sp": True}},
    "sinks-pp": {"kind": "sinks", "layout": {"pp": 2, "dp": 2, "ep": 2}},
    "experts-pp": {"kind": "moe", "layout": {"pp": 2, "dp": 2, "ep": 2}},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Case -> what each rank found."""
    out = tmp_path_factory.mktemp("costs")
    cases = json.dumps([{"name": name, **case} for name, case in CASES.items()])
    run_ranks(4, WORKER, cases, out)
    return {name: [json.loads((out / f"{name}-{rank}.json").read_text()) for rank in range(4)] for name in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_weights_on_every_rank(found, name):
    for rank in found[name]:
        assert rank["counted"] == rank["held"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "pp" not in case["layout"]])
def test_activations_are_what_fused_layers_would_keep(found, name):
    """Autograd keeps all that is counted, and of the reference layers' single operations less than as much again."""
    for rank in found[name]:
        assert rank["estimated"] <= rank["kept"] <= ACTIVATIONS_REFERENCE * rank["estimated"]
