"""The real model: SmolLM2-135M through Megatron against transformers and against NeMo's own importer."""

import json
import sys
from pathlib import Path

import forked
import pytest
from tolerances import LOGITS_FP32

pytestmark = pytest.mark.slow
MODEL = Path(__file__).parents[3] / "demo" / "smollm2-135m-instruct"
SCRIPT = Path(__file__).parent / "smollm2_script.py"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    assert MODEL.is_dir(), "make venv makes the demo's model"
    command = [sys.executable, str(SCRIPT), str(MODEL), str(tmp_path_factory.mktemp("smollm2"))]
    done = forked.run(command)
    assert done.returncode == 0, done.stderr[-6000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


def test_logits_equal_transformers(result):
    assert result["logits"] < LOGITS_FP32
    assert result["next_tokens_differ"] == 0


def test_weights_equal_nemos_own_importer(result):
    assert result["parameters"] == 134_515_008
    assert result["differs_from_importer"] == []


def test_round_trip_is_bit_equal(result):
    assert result["tensors"] == 272
    assert result["round_trip_differs"] == []
