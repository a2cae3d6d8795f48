"""FP8 under tensor and sequence parallelism, over gloo.

Delayed scaling joins the largest magnitudes of all ranks: two ranks multiply the very values that one process does.
Current scaling does not: a rank's shard of a matrix has its own scale, so the result depends on the layout, by nature.
Fails, tried by hand: without the reduction over the amax group (both delayed cases).
"""

import json
from pathlib import Path

import fp8_worker
from ranks import run_ranks
from tolerances import FP8_GRADIENT, FP8_LAYOUT

WORKER = Path(fp8_worker.__file__)


def test_two_ranks_against_one(tmp_path):
    out = tmp_path / "out.json"
    run_ranks(2, WORKER, out)
    found = json.loads(out.read_text())
    for name in ("delayed", "delayed_sp"):
        assert found[name] < FP8_LAYOUT, name
    for name in ("tensorwise", "tensorwise_sp"):
        assert FP8_LAYOUT < found[name] < FP8_GRADIENT, name
