"""Qwen2-MoE on Megatron-Bridge beyond `test_families.py`: cuts by hand, what is exact (transformers 4 has no model of
the contract's sizes), scores with the shared expert's gate, and checkpoints in every layout.

Mutations tried, each of which fails here: the gate left out of the shared expert's scores; the gate of a part of the
sequence under sequence parallelism.
"""

import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from pico import pico_qwen2_moe, raw_tensors
from ranks import run_ranks
from tolerances import SCORES_FLOAT64, SCORES_FP32

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))

import contract
import test_family_contract as of_4
import test_rearranged
from test_families import keep_of

from nemo_minitron.families import family_of, from_hf, read_config
from nemo_minitron.pruning import prune

WORKER = Path(__file__).with_name("deepseek_worker.py")
BRIDGE = any(name == "megatron-bridge" for names in metadata.packages_distributions().values() for name in names)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BRIDGE, reason="Megatron-Bridge is not installed here")]
VARIANTS = ["qwen2_moe-own", "qwen2_moe-other"]
LAYOUTS = {
    "dp": {"dp": 2}, "ep": {"ep": 2, "dp": 2}, "pp": {"pp": 2}, "tp": {"tp": 2, "sp": True}, "cp": {"cp": 2},
    "tp-ep": {"tp": 2, "ep": 2, "etp": 1, "sp": True}, "plain-tp": {"tp": 2},
}  # fmt: skip
SIZES = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "mlp_only_layers": [1]}
KEYS = (
    "norm_topk_prob",
    "qkv_bias",
    "mlp_only_layers",
    "shared_expert_intermediate_size",
    "rms_norm_eps",
    "rope_theta",
)
CASES = [{"name": name, "model": "teacher", "layout": layout, "keys": KEYS} for name, layout in LAYOUTS.items()]


# -- cuts ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A folder as `test_family_contract.py` has it."""
    folder = tmp_path_factory.mktemp("tokens")
    np.save(folder / "tokens.npy", np.random.default_rng(3).integers(0, 509, (2, 24)))
    for name in VARIANTS:
        contract.make(folder / f"{name}-teacher", name)
    return folder


@pytest.fixture
def any_width(monkeypatch):
    """transformers 5 with experts of any width."""
    loaded = of_4.loaded

    def eager(folder):
        model = loaded(folder)
        model.set_experts_implementation("eager")
        return model

    for module in (of_4, test_rearranged):
        monkeypatch.setattr(module, "loaded", eager)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_cut_is_slicing_by_hand(name, tokens, tmp_path):
    """Along all axes; the config has the sizes, by transformers' names."""
    teacher, keep = tokens / f"{name}-teacher", keep_of(name)
    student = prune(teacher, contract.plan_of(from_hf(teacher), keep), tmp_path / "s")
    sliced = contract.slice_by_hand(raw_tensors(teacher), keep)
    assert sliced["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, 40)
    of_4.assert_same_bits(raw_tensors(student), sliced)
    config = read_config(student)
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "num_experts")
    assert [config[name] for name in names] == [2, 40, 4, 2, 3]
    names = ("num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size", "mlp_only_layers")
    assert [config[key] for key in names] == [2, 48, 96, [1] if name.endswith("other") else []]


@pytest.mark.parametrize("name", VARIANTS)
def test_exact_axes_are_exact(name, tokens, tmp_path, any_width):
    for axis in sorted(family_of(read_config(tokens / f"{name}-teacher")).exact_axes - {"vocab"}):
        if (name, axis) != ("qwen2_moe-own", "ffn"):  # all its layers are mixtures
            of_4.test_exact_axes_are_exact(name, axis, tokens, tmp_path / axis)


@pytest.mark.parametrize("name", VARIANTS)
def test_hidden_order_and_masks(name, tokens, tmp_path, any_width):
    of_4.test_hidden_is_not_exact(name, tokens, tmp_path / "hidden")
    of_4.test_order_changes_nothing(name, tokens, tmp_path / "order")
    test_rearranged.test_a_model_in_ranked_order_is_the_same_model(name, tmp_path / "ranked")
    test_rearranged.test_slices_are_masks_on_exact_axes(name, tmp_path / "masks")


# -- scores ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    pico_qwen2_moe(folder / "teacher", **SIZES)
    np.save(folder / "tokens.npy", np.random.default_rng(3).integers(0, 509, (4, 24)))
    return folder


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("world2")
    run_ranks(2, WORKER, models, json.dumps(CASES), out)
    return out


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_of_any_layout_is_the_folder_again(name, results):
    assert json.loads((results / f"{name}.json").read_text()) == []


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "dp"])
def test_scores_of_a_layout_are_one_processs(name, results):
    one, found = np.load(results / "dp.npz"), np.load(results / f"{name}.npz")
    axes = {"heads", "query_groups", "experts", "expert_ffn", "shared_expert_ffn", "ffn", "hidden", "layers"}
    assert {f"{method}-{axis}" for method in ("activation", "taylor") for axis in axes} <= {*one.files}
    for score in one.files:
        largest = np.abs(one[score]).max(-1, keepdims=True)
        assert np.all(np.abs(found[score] - one[score]) <= SCORES_FP32 * largest), score


def test_the_shared_experts_scores_are_transformers_in_float64(models, results):
    """Its neurons times its gate; without the gate they are others."""
    import torch
    from transformers import AutoModelForCausalLM

    found = np.load(results / "dp.npz")["activation-shared_expert_ffn"]
    model = AutoModelForCausalLM.from_pretrained(models / "teacher", dtype=torch.float64, attn_implementation="eager")
    model.set_experts_implementation("eager")
    gates, neurons = {}, {}
    for i in (0, 2, 3):
        mlp = model.model.layers[i].mlp
        mlp.shared_expert_gate.register_forward_hook(lambda _, given, out, i=i: gates.update({i: out.sigmoid()}))
        mlp.shared_expert.down_proj.register_forward_pre_hook(lambda _, given, i=i: neurons.update({i: given[0]}))
    with torch.no_grad():
        model(torch.from_numpy(np.load(models / "tokens.npy")))
    for i in (0, 2, 3):
        wanted, ungated = (
            x.reshape(4, 24, -1).abs().mean(1).norm(dim=0).numpy() for x in (neurons[i] * gates[i], neurons[i])
        )
        np.testing.assert_allclose(found[i], wanted, rtol=0, atol=SCORES_FLOAT64 * wanted.max())
        assert np.abs(found[i] - ungated).max() > 0.1 * ungated.max()
