"""Fine-tuning in every layout: the losses of one process, step by step, on either host.

The rows have prompts and answers of unlike lengths, so that data-parallel ranks have unequal numbers of tokens that
count. Mutations tried by hand, each of which makes a test here fail: Megatron's own loss (TP: the padding counts; two
rows in a micro-batch: other weights).
"""

import csv
import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from pico import pico_llama, pico_nemotron_h, pico_qwen3_moe
from ranks import run_ranks
from tolerances import LOSS_LAYOUT_FP32
from words import save_tokenizer

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "finetune_worker.py"
ROWS = [(f"the model number {i}", f"reads {i * 7} words {'word ' * (i * i % 13)}ends.") for i in range(40)]
RECIPE = {
    "steps": 4, "sequence_length": 32, "global_batch_size": 4, "micro_batch_size": 1, "precision": "fp32",
    "learning_rate": 1e-2,
}  # fmt: skip
LAYOUTS = {  # world size -> model, layout; TP pads the vocabulary of 509
    1: [("llama", {}), ("moe", {})],
    2: [("llama", {"dp": 2}), ("llama", {"pp": 2}), ("llama", {"tp": 2, "sp": True}), ("moe", {"tp": 2, "sp": True})],
}
if any("megatron-bridge" in names for names in metadata.packages_distributions().values()):
    LAYOUTS[1] += [("hybrid", {})]  # Bridge alone has it
    LAYOUTS[2] += [("hybrid", {"tp": 2, "sp": True}), ("hybrid", {"pp": 2})]
CASES = [
    {"name": model + "".join(f"-{k}{v}" for k, v in layout.items()), "model": model, "layout": layout,
     "recipe": RECIPE, "world": world}
    for world, layouts in LAYOUTS.items()
    for model, layout in layouts
]  # fmt: skip
TWO_ROWS = {"name": "llama-two-rows", "model": "llama", "layout": {}, "recipe": RECIPE | {"micro_batch_size": 2}}
CASES.append(TWO_ROWS | {"world": 1})
SPREAD = [case for case in CASES if case["name"] != case["model"]]


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Name of a case -> its losses by column."""
    folder, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("tuned")
    sizes = {"vocab_size": 509, "num_attention_heads": 8, "num_key_value_heads": 4}
    pico_llama(folder / "llama", **sizes)
    pico_qwen3_moe(folder / "moe", **sizes, router_aux_loss_coef=0.3)
    models = {case["model"] for case in CASES}
    if "hybrid" in models:
        pico_nemotron_h(folder / "hybrid", **sizes)
    for model in models:
        save_tokenizer(folder / model, [" ".join(row) for row in ROWS], 509)
    (folder / "rows").mkdir()
    lines = [json.dumps({"input": prompt, "output": answer}) for prompt, answer in ROWS]
    (folder / "rows" / "training.jsonl").write_text("\n".join(lines))
    for world in LAYOUTS:
        run_ranks(world, WORKER, folder, json.dumps([case for case in CASES if case["world"] == world]), out)
    return {case["name"]: _losses(out / case["name"] / "loss.csv") for case in CASES}


def _losses(file):
    rows = list(csv.DictReader(file.open()))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0] if name != "seconds"}


@pytest.mark.parametrize("case", SPREAD, ids=lambda case: case["name"])
def test_losses_equal_one_process(case, losses):
    found, expected = losses[case["name"]], losses[case["model"]]
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=LOSS_LAYOUT_FP32, err_msg=name)


def test_a_mixtures_routers_have_the_loss_of_its_config(losses):
    assert "moe_aux_loss" not in losses["llama"]
    assert (losses["moe"]["moe_aux_loss"] > 0).all()


def test_the_student_learns(losses):
    assert losses["llama"]["loss"][-1] < losses["llama"]["loss"][0]
    assert len(losses["llama"]["loss"]) == RECIPE["steps"]
