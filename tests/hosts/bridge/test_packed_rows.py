"""Packed rows (`cu_seqlens`) in a distillation on Bridge: a sample has the losses that it has in a row of its own."""

import json
from pathlib import Path

import numpy as np
import pytest
from pico import pico_gemma2, pico_gemma3_text, pico_llama, pico_nemotron_h
from ranks import run_ranks
from tolerances import LOSS_LAYOUT_FP32

from nemo_minitron.families import from_hf
from nemo_minitron.pruning import prune
from nemo_minitron.search import random_plan

pytestmark = [pytest.mark.slow, pytest.mark.bridge]
WORKER = Path(__file__).parent / "packed_worker.py"


@pytest.mark.parametrize("family", [pico_llama, pico_gemma2, pico_gemma3_text, pico_nemotron_h])
def test_a_sample_learns_as_if_it_were_alone(tmp_path, family):
    """Samples are longer than the windows of Gemma's layers. In a Mamba layer no state passes from one to the next."""
    family(tmp_path / "teacher")
    prune(tmp_path / "teacher", random_plan(from_hf(tmp_path / "teacher"), keep={"ffn": 48}), tmp_path / "student")
    run_ranks(1, WORKER, tmp_path, json.dumps([5, 11, 3]), tmp_path / "losses.json")
    found = json.loads((tmp_path / "losses.json").read_text())
    assert len(found["packed"]) == 19
    np.testing.assert_allclose(found["packed"], found["alone"], rtol=LOSS_LAYOUT_FP32)
