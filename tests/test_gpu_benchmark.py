"""benchmarks/gpu.py without a GPU: every part at pico sizes, on the reference layers; and its refusal."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(BENCHMARK), "--device", "cpu", "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())["found"]
    parts = {name: part for name, part in found.items() if isinstance(part, dict)}
    assert {name: part["error"] for name, part in parts.items() if "error" in part and "Liger" not in name} == {}
    assert len(parts) == 10
    assert parts["loss: fused head"]["over its four products"] > 0
    assert parts["teacher in the CPU's memory: pico"]["ratio"] > 0
    assert parts["step: pico, bf16"]["bytes in the dry run"] > 0
    assert parts["importance: scored over plain"]["ratio"] > 0
    assert parts["step: pico, all FP8"]["student"] == "fp8-delayed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_run():
    done = subprocess.run([sys.executable, str(BENCHMARK)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "--device cpu --quick" in done.stderr
