"""FP8 under tensor and sequence parallelism, over gloo.

Delayed scaling joins the largest magnitudes of all ranks: two ranks multiply the very values that one process does.
Current scaling does not: a rank's shard of a matrix has its own scale, so the result depends on the layout, by nature.
Fails, tried by hand: without the reduction over the amax group (both delayed cases).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import fp8_worker
from tolerances import FP8_GRADIENT, FP8_LAYOUT

WORKER = Path(fp8_worker.__file__)


def test_two_ranks_against_one(tmp_path):
    out = tmp_path / "out.json"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent.parent)}
    done = subprocess.run([*start, str(WORKER), str(out)], env=environment, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    found = json.loads(out.read_text())
    for name in ("delayed", "delayed_sp"):
        assert found[name] < FP8_LAYOUT, name
    for name in ("tensorwise", "tensorwise_sp"):
        assert FP8_LAYOUT < found[name] < FP8_GRADIENT, name
