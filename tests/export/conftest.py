"""A finished run of a small model, as files; its values are known to the tests."""

import json

import numpy as np
import pytest
from run_folder import EVIL, SOURCE, top, write

from nemo_minitron.artifacts import PrunePlan, Scores


@pytest.fixture
def scores():
    random = np.random.default_rng(0)
    shapes = {"ffn": (4, 600), "hidden": (12,), "heads": (4, 6), "query_groups": (4, 2), "layers": (4,)}
    tensors = {name: random.uniform(0.1, 2, shape).astype(np.float32) for name, shape in shapes.items()}
    return Scores(SOURCE, tensors, samples=8, tokens=4096)


@pytest.fixture
def width_plan(scores):
    keep = {"hidden": top(scores["hidden"], 8), "ffn": {i: top(scores["ffn"][i], 400) for i in range(4)}}
    return PrunePlan(SOURCE, SOURCE.replace(hidden_size=8, ffn_hidden_size=400), keep)


@pytest.fixture
def run(tmp_path, scores, width_plan):
    """A finished run."""
    folder = tmp_path / "my run"
    (folder / "checkpoints/distilled").mkdir(parents=True)
    scores.save(folder / "scores.safetensors")
    width_plan.save(folder / "plan.json")
    write(
        folder,
        "recipe.json",
        {"name": EVIL, "keep": {"ffn": 400}, "teacher": "models/big", "layout": {"dp": 2, "tp": 3}},
    )
    stages = [
        {"name": "estimate", "seconds": 75.2, "digest": "a"},
        {"name": "prune", "seconds": 1.0, "digest": "b"},
    ]
    write(
        folder,
        "manifest.json",
        {"versions": {"torch": "2.13.0"}, "digests": {"model": "feed"}, "stages": stages},
    )
    row = {
        "corpus": f"wiki $x$ {EVIL}",
        "tokens": 45000,
        "parameters": 1234,
        "bits_per_byte": None,
        "seconds": 3.0,
    }
    numbers = [("distilled", 68.0), ("teacher", 17.25), ("pruned", 500.5), ("random", 9.7e7)]
    write(folder, "numbers.json", [
        row | {"stage": stage, "perplexity": value, "loss": float(np.log(value))} for stage, value in numbers
    ])  # fmt: skip
    rows = json.loads((folder / "numbers.json").read_text())
    rows[0] |= {"gap": 1.3716, "gap_error": 0.01, "agreement": 0.612, "agreement_error": 0.004}
    write(folder, "numbers.json", rows)
    timed = {"prompt": 256, "new": 32, "precision": "bf16", "device": "CPU, 2 threads", "in_turn": True}
    speeds = {"teacher": (1.25, 17.04), "distilled": (0.8, 21.0)}
    write(folder, "speed.json", {
        stage: timed | {"latency": latency, "tokens_per_second": rate} for stage, (latency, rate) in speeds.items()
    })  # fmt: skip
    texts = {stage: f" {stage} text {EVIL}" for stage in ("pruned", "teacher")}
    write(
        folder,
        "samples.json",
        [{"stage": s, "prompt": f"Prompt {EVIL}", "text": t} for s, t in texts.items()],
    )
    losses = [f"{i + 1},{(i + 1) * 128},{5 - i / 50},0.5" for i in range(100)]
    (folder / "checkpoints/distilled/loss.csv").write_text("\n".join(["step,tokens,loss,seconds", *losses]) + "\n")
    return folder
