"""Tensor, sequence, context, pipeline (virtual, too), data and expert parallelism of the twin's layers.

In real processes: one torchrun for each number of them; `backend_worker.py` says what it does. Tried by hand, each of
these makes a test fail: norm parameters without their `sequence_parallel` flag (tp2_sp), shards without their mark
(tp2: the gradient's norm; hybrid-tp2: the gated norm's), virtual stages without the mends in `cpu.py` (pp2_vp2),
context-parallel chunks in plain order (cp2), the rotary key's gradient not summed over ranks (mla-tp2), experts'
gradients left to Megatron's data-parallel group (moe-tp2_sp_etp1), an expert's bias summed over tensor-parallel ranks
(sinks-tp2_sp_etp1), the dispatcher's collectives without the mends in
`dispatch.py` (moe-ep2, and moe-tp2_sp_ep2_etp2 for the unequal ones: both raise).
"""

import json
from pathlib import Path

import backend_worker
import pytest
from ranks import run_ranks
from tolerances import LAYOUT_GRADIENT_FP32, STEP_LOSS_FP32, STEP_NORM_FP32

WORKER = Path(backend_worker.__file__)
CASES = [
    pytest.param(world, f"{kind}-{name}", id=f"{kind}-{name}", marks=[pytest.mark.slow] if world > 2 else [])
    for world, layouts in backend_worker.LAYOUTS.items()
    for name, (_, _, kinds) in layouts.items()
    for kind in kinds
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    done = {}

    def of(world):
        if world not in done:
            out = tmp_path_factory.mktemp("layouts") / f"{world}.json"
            run_ranks(world, WORKER, out)
            done[world] = json.loads(out.read_text())
        return done[world]

    return of


@pytest.mark.parametrize(("world", "case"), CASES)
def test_a_layout_trains_like_one_process(results, world, case):
    result = results(world)[case]
    for name, tolerance in (("loss", STEP_LOSS_FP32), ("norm", STEP_NORM_FP32), ("after", STEP_LOSS_FP32)):
        got, wanted = result[name]
        assert got == pytest.approx(wanted, rel=tolerance), name
    difference, where = result["gradients"]
    assert difference < LAYOUT_GRADIENT_FP32, where
    assert result["after"][1] < result["loss"][1]  # the step went somewhere
