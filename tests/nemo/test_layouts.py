"""A layout never changes a result: weights, digests, scores and logits of every layout against one process."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pico import pico_llama, pico_mistral
from tolerances import LOGITS_PICO_FP32, SCORES_FP32

from nemo_minitron.artifacts import Scores

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "layouts_worker.py"
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 16}
MODELS = {  # TP must divide the query groups: 3 for TP=3, 4 for TP=2 and 4; the vocabulary of 509 divides by none
    "three": lambda folder: pico_llama(folder, num_attention_heads=6, num_key_value_heads=3),
    "four": lambda folder: pico_llama(folder, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True),
    "llama3-rope": lambda folder: pico_llama(folder, rope_scaling=LLAMA3_ROPE),
    "linear-rope": lambda folder: pico_llama(folder, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "mistral": lambda folder: pico_mistral(folder, sliding_window=8),
}
LAYOUTS = {  # world size -> layouts; a new layout is one entry
    1: [("three", {}), ("four", {}), ("mistral", {}), ("llama3-rope", {}), ("linear-rope", {})],
    2: [
        ("four", {"tp": 2}),
        ("four", {"tp": 2, "sp": True}),
        ("four", {"pp": 2}),
        ("three", {"pp": 2}),
        ("three", {"pp": 2, "vp": 3}),
        ("three", {"dp": 2}),
    ],
    3: [
        ("three", {"tp": 3}),
        ("three", {"tp": 3, "sp": True}),
        ("mistral", {"tp": 3, "sp": True}),
        ("three", {"pp": 3}),
    ],
    4: [
        ("four", {"tp": 4, "sp": True}),
        ("four", {"tp": 2, "pp": 2, "sp": True}),
        ("four", {"tp": 2, "dp": 2, "sp": True}),
    ],
}
CASES = [
    {
        "name": model + "".join(f"-{k}{v}" for k, v in layout.items()),
        "model": model,
        "layout": layout,
        "world": world,
    }
    for world, layouts in LAYOUTS.items()
    for model, layout in layouts
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        make(folder / name)
    np.save(folder / "tokens.npy", np.random.default_rng(3).integers(0, 509, (16, 24)))
    return folder


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    """World size -> folder of results; one torchrun for all layouts of a size."""
    done = {}

    def of(world):
        if world not in done:
            out = tmp_path_factory.mktemp(f"world{world}")
            cases = json.dumps([case for case in CASES if case["world"] == world])
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={world}",
            ]
            run = subprocess.run(
                [*command, str(WORKER), str(models), cases, str(out)],
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert run.returncode == 0, run.stderr[-6000:]
            done[world] = out
        return done[world]

    return of


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_weights_and_digest(case, results):
    result = json.loads((results(case["world"]) / f"{case['name']}.json").read_text())
    assert result["differing"] == []
    assert result["digest"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_scores_equal_one_process(case, results):
    scores = Scores.load(results(case["world"]) / f"{case['name']}.safetensors")
    reference = Scores.load(results(1) / f"{case['model']}.safetensors")
    assert (scores.samples, scores.tokens) == (16, 16 * 24)
    assert set(scores.tensors) == {"ffn", "heads", "query_groups", "norms", "hidden", "layers", "mlp_output"}
    for name, expected in reference.tensors.items():
        largest = np.abs(expected).max(axis=-1, keepdims=True)
        assert (np.abs(scores[name] - expected) / largest).max() < SCORES_FP32, name


@pytest.mark.parametrize("case", [c for c in CASES if c["layout"].get("pp", 1) == 1], ids=lambda case: case["name"])
def test_logits_equal_transformers(case, results, models):
    import torch
    from transformers import AutoModelForCausalLM

    tokens = torch.from_numpy(np.load(models / "tokens.npy"))[:2]
    model = AutoModelForCausalLM.from_pretrained(models / case["model"], torch_dtype=torch.float32)
    expected = model(tokens).logits.detach().numpy()
    logits = np.load(results(case["world"]) / f"{case['name']}.npy")
    assert np.abs(logits - expected).max() < LOGITS_PICO_FP32
    assert (logits.argmax(-1) == expected.argmax(-1)).all()
