"""Gemma on Megatron-Bridge: scores in every layout and in float64, logits beside padding, checkpoints, packed rows;
likewise, in two layouts, Granite, longrope and YaRN, which NeMo has not, and Qwen with windows in some layers.

Mutations tried, each of which fails here or in test_families.py: post norms with Bridge's epsilon of 1e-5; one rotary
base for all layers, or the scaling on both; no cap of scores, or of logits; the embedding's scale left out, or a
student's with its own multiplier.
"""

import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from tolerances import LOGITS_PICO_FP32, SCORES_FLOAT64, SCORES_FP32
from words import save_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))

import contract
from test_families import keep_of, make

from nemo_minitron.families import family_of, from_hf, read_config
from nemo_minitron.families.bridge import bridge_fields
from nemo_minitron.pruning import prune
from nemo_minitron.sources.checkpoint import CheckpointSource
from nemo_minitron.sources.folder import HFSource
from nemo_minitron.sources.tensors import whole

WORKER = Path(__file__).with_name("gemma_worker.py")
BRIDGE = any(name == "megatron-bridge" for names in metadata.packages_distributions().values() for name in names)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BRIDGE, reason="Megatron-Bridge is not installed here")]
GEMMA = ["gemma2-own", "gemma3_text-own"]
NAMES = [*GEMMA, "granite-other", "phi3-long", "arcee-yarn", "qwen2-own", "qwen3-own"]
LAYOUTS = {"dp": {"dp": 2}, "tp": {"tp": 2, "sp": True}, "pp": {"pp": 2}, "cp": {"cp": 2}}
CASES = [
    {"name": f"{family}-{name}", "family": family, "layout": layout}
    for family in NAMES
    for name, layout in LAYOUTS.items()
    if family in GEMMA or name in ("dp", "tp")
]
LENGTH = 24  # of a sample; the window is 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in NAMES:
        teacher = make(folder / f"{name}-teacher", name)
        save_tokenizer(teacher, ["the model reads words"], 509)
        plan = contract.plan_of(from_hf(teacher), keep_of(name))
        plan.save(folder / f"{name}-plan.json")
        prune(teacher, plan, folder / f"{name}-student")
    np.save(folder / "tokens.npy", np.random.default_rng(3).integers(0, 509, (4, LENGTH)))
    return folder


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("world2")
    run_ranks(2, WORKER, models, json.dumps(CASES), out)
    return out


def reference(folder, dtype):
    import torch
    from transformers import AutoModelForCausalLM

    options = {"dtype": getattr(torch, dtype), "attn_implementation": "eager"}  # SDPA leaves a cap of the scores out
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("case", [case for case in CASES if "dp" not in case["layout"]], ids=lambda case: case["name"])
def test_scores_of_a_layout_are_one_processs(case, results):
    one, found = (np.load(results / f"{name}.npz") for name in (f"{case['family']}-dp", case["name"]))
    names = [name for name in one.files if "-" in name]
    axes = [f"{method}-{axis}" for method in ("activation", "taylor") for axis in ("ffn", "heads", "layers")]
    assert {*axes} <= {*names}
    for name in names:
        largest = np.abs(one[name]).max(-1, keepdims=True)
        assert np.all(np.abs(found[name] - one[name]) <= SCORES_FP32 * largest), name


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_transformers_in_float64(name, models, results):
    """Of hidden channels by the norms that read the residual stream: those behind attention and MLP are none of it."""
    import torch

    model, seen, layers = reference(models / f"{name}-teacher", "float64"), {}, range(contract.DEPTH)

    def keep(key, module, of):
        module.register_forward_hook(lambda m, given, out: seen.update({key: of(given, out)}))

    for i, layer in enumerate(model.model.layers):
        keep(("ffn", i), layer.mlp.down_proj, lambda given, out: given[0])
        keep(("heads", i), layer.self_attn.o_proj, lambda given, out: given[0].unflatten(-1, (-1, 8)).norm(dim=-1))
        keep(("norms", 2 * i), layer.input_layernorm, lambda given, out: out)
        second = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
        keep(("norms", 2 * i + 1), second, lambda given, out: out)
    keep(("norms", 2 * contract.DEPTH), model.model.norm, lambda given, out: out)
    with torch.no_grad():
        model(torch.from_numpy(np.load(models / "tokens.npy")))
    scored = {key: value.abs().mean(1).square().sum(0).sqrt().numpy() for key, value in seen.items()}
    found = np.load(results / f"{name}-dp.npz")
    for axis in ("ffn", "heads"):
        wanted = np.stack([scored[axis, i] for i in layers])
        np.testing.assert_allclose(found[f"activation-{axis}"], wanted, rtol=0, atol=SCORES_FLOAT64 * wanted.max())
    wanted = sum(scored["norms", row] for row in range(2 * contract.DEPTH + 1))
    np.testing.assert_allclose(found["activation-hidden"], wanted, rtol=0, atol=SCORES_FLOAT64 * wanted.max())


@pytest.mark.parametrize("name", NAMES)
def test_logits_beside_padding_are_transformers(name, models, results):
    """Padding behind a sample, which transformers' mask hides, is behind its tokens for Megatron's, too."""
    import torch

    tokens, mask = torch.from_numpy(np.load(models / "tokens.npy")), torch.ones(4, LENGTH, dtype=torch.long)
    mask[1, 17:] = mask[3, 5:] = 0
    with torch.no_grad():
        expected = reference(models / f"{name}-teacher", "float32")(tokens, attention_mask=mask).logits.numpy()
    found, counts = np.load(results / f"{name}-dp.npz")["logits"], mask.bool().numpy()
    assert np.abs(found - expected)[counts].max() < LOGITS_PICO_FP32


@pytest.mark.parametrize("name", NAMES)
def test_a_distillation_compares_capped_logits(name, models, results):
    """In two tensor-parallel ranks; the fused head, which knows states and weights alone, must not take part."""
    import torch

    tokens = torch.from_numpy(np.load(models / "tokens.npy"))
    with torch.no_grad():
        teacher, student = (
            reference(models / f"{name}-{model}", "float32")(tokens).logits.double().log_softmax(-1)
            for model in ("teacher", "student")
        )
    expected = (teacher.exp() * (teacher - student)).sum(-1).numpy()
    found = np.load(results / f"{name}-tp.npz")["divergence"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=LOGITS_PICO_FP32)


@pytest.mark.parametrize("model", ["teacher", "student"])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_bridge_is_the_folder_again(name, model, models, results):
    """The student's was cut from the live model, in two tensor-parallel ranks."""
    found, expected = CheckpointSource(results / f"{name}-{model}"), HFSource(models / f"{name}-{model}")
    assert found.architecture == expected.architecture
    for tensor, shape in expected.architecture.shapes().items():
        assert np.array_equal(found.read(tensor, whole(shape)), expected.read(tensor, whole(shape))), tensor
    folder = read_config(models / f"{name}-{model}")
    fields = [bridge_fields(family_of(config), config) for config in (found.config, folder)]
    for one in fields:
        del one["seq_length"]  # Bridge keeps no longest sequence
    assert fields[0] == fields[1]
