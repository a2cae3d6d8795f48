"""A mixture of experts in every layout: the filled, cut and saved models equal the Hugging Face folder, bit by bit.

Mutations tried, each of which fails here: experts numbered by their place on the rank alone; every copy of an
expert contributing (an all-reduce of bytes then overflows); experts sharded by the dense layers' tensor
parallelism.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from pico import pico_mixtral, pico_qwen3_moe
from ranks import run_ranks
from tolerances import LOGITS_PICO_FP32

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.families import from_hf
from nemo_minitron.hosts import host_name
from nemo_minitron.pruning import prune

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "moe_layouts_worker.py"
LAYOUTS = [
    {"ep": 2, "dp": 2},
    {"tp": 2, "etp": 1},
    {"tp": 2, "etp": 2},
    {"tp": 2, "etp": 2, "sp": True},
    {"tp": 2, "ep": 2, "etp": 1, "sp": True},  # Megatron runs it with sequence parallelism alone
    {"dp": 2},
    {"pp": 2},
]
CASES = [{"name": "-".join(f"{k}{v}" for k, v in layout.items()), "layout": layout} for layout in LAYOUTS]
SIZES = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}  # the groups divide by TP=2


MIXED = {"mlp_only_layers": [3]}  # a dense layer among mixtures


def plan_of(source):
    """Keeps two layers of four, two experts of four in each mixture, 24 neurons of 40 in each expert, 40 channels of
    48."""
    layers = [1, 3]
    experts = {n: kept for n, kept in {1: [0, 3], 3: [1, 2]}.items() if n in source.moe_layers}
    keep = {"layers": layers, "hidden": list(range(4, 44)), "experts": experts}
    keep["expert_ffn"] = {
        n: {e: sorted(i * 7 % 40 for i in range(n + e, n + e + 24)) for e in experts[n]} for n in experts
    }
    target = source.keep_layers(layers).replace(hidden_size=40, num_moe_experts=2, moe_ffn_hidden_size=24)
    return PrunePlan(source=source, target=target, keep=keep)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    bridge = host_name() == "bridge"  # NeMo gets its own Qwen3-MoE in test_reap.py
    teacher = (
        pico_qwen3_moe(folder / "teacher", **SIZES | MIXED) if bridge else pico_mixtral(folder / "teacher", **SIZES)
    )
    plan = plan_of(from_hf(teacher))
    plan.save(folder / "plan.json")
    prune(teacher, plan, folder / "student")
    np.save(folder / "tokens.npy", np.random.default_rng(3).integers(0, 509, (2, 24)))
    return folder


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory):
    """One worker runs all layouts."""
    out = tmp_path_factory.mktemp("world2")
    run_ranks(2, WORKER, folder, json.dumps(CASES), out)
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_weights(case, results):
    result = json.loads((results / f"{case['name']}.json").read_text())
    assert len(result) == (8 if host_name() == "nemo" else 4)  # without two kinds of checkpoints
    assert not any(result.values()), result


@pytest.mark.parametrize("model", ["teacher", "student"])
@pytest.mark.parametrize("case", [case for case in CASES if "pp" not in case["layout"]], ids=lambda case: case["name"])
def test_logits_equal_transformers(case, model, results, folder):
    import torch
    from transformers import AutoModelForCausalLM

    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    reference = AutoModelForCausalLM.from_pretrained(folder / model, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(tokens).logits.numpy()
    logits = np.load(results / f"{case['name']}.npz")[model]
    assert np.abs(logits - expected).max() < LOGITS_PICO_FP32
    assert (logits.argmax(-1) == expected.argmax(-1)).all()
