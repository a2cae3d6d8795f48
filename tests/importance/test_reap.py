"""Experts of Qwen3-MoE by REAP (2510.13999) and by frequency: transformers in float64, and every layout.

One model normalizes the probabilities of the chosen experts, the other does not, and has a dense layer.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from pico import pico_qwen3_moe, raw_tensors
from ranks import run_ranks
from tolerances import SCORES_FLOAT64, SCORES_FP32

from nemo_minitron.artifacts import Scores
from nemo_minitron.errors import InputError
from nemo_minitron.importance.diagnostics import split_half
from nemo_minitron.settings.calibration import Calibration
from nemo_minitron.settings.layout import Layout

WORKER = Path(__file__).parent / "reap_worker.py"
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
MODELS = {"normalized": HEADS, "plain": HEADS | {"norm_topk_prob": False, "mlp_only_layers": [1]}}
LAYOUTS = {1: [{}], 2: [{"ep": 2, "dp": 2}, {"tp": 2, "sp": True}, {"pp": 2}, {"pp": 2, "vp": 2}]}
KINDS = ("plain", "masked")
NAMES = ("gate", "up", "down")
CASES = [
    {"name": f"{model}-{'-'.join(layout) or 'one'}", "model": model, "layout": layout, "kinds": KINDS, "world": world}
    for world, layouts in LAYOUTS.items()
    for layout in layouts
    for model in MODELS
]
EACH = [(case, kind) for case in CASES for kind in KINDS]
each = pytest.mark.parametrize(("case", "kind"), EACH, ids=[f"{case['name']}-{kind}" for case, kind in EACH])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, fields in MODELS.items():
        pico_qwen3_moe(folder / name, **fields)
    np.save(folder / "tokens.npy", np.random.default_rng(3).integers(0, 509, (16, 24)))
    lengths = [24, 5, 17, 0, 24, 1, 20, 13, 24, 9, 0, 24, 11, 19, 7, 16]
    np.save(folder / "mask.npy", (np.arange(24) < np.array(lengths)[:, None]).astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def scores(models, tmp_path_factory):
    """(case's name, kind of batches) -> Scores."""
    out = tmp_path_factory.mktemp("scores")
    for world in LAYOUTS:
        run_ranks(world, WORKER, models, json.dumps([case for case in CASES if case["world"] == world]), out)
    return lambda name, kind: Scores.load(out / f"{name}-{kind}.safetensors")


def by_the_book(folder, kind, models):
    """(REAP, tokens) of each expert, float64 [layers, experts], from transformers' model; a dense layer has zeros."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    if hasattr(model, "set_experts_implementation"):  # transformers 5: its grouped product has no float64
        model.set_experts_implementation("eager")
    top_k, normalized = model.config.num_experts_per_tok, model.config.norm_topk_prob
    sums, counts = np.zeros((2, len(model.model.layers), model.config.num_experts))
    raw = {name: torch.from_numpy(bits.view(np.float32)).double() for name, bits in raw_tensors(folder).items()}

    def expert(layer, e, h):
        gate, up, down = (raw[f"model.layers.{layer}.mlp.experts.{e}.{name}_proj.weight"] for name in NAMES)
        return down @ (torch.nn.functional.silu(gate @ h) * (up @ h))

    def keep(layer):
        def hook(mlp, args, output):
            h = args[0].flatten(0, 1)
            weights, chosen = (h @ raw[f"model.layers.{layer}.mlp.gate.weight"].t()).softmax(-1).topk(top_k)
            weights = weights / weights.sum(-1, keepdim=True) if normalized else weights
            for token, experts in enumerate(chosen.tolist()):
                for weight, e in zip(weights[token], experts, strict=True):
                    sums[layer, e] += weight * expert(layer, e, h[token]).norm()
                    counts[layer, e] += 1

        return hook

    for i, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            layer.mlp.register_forward_hook(keep(i))
    tokens, mask = np.load(models / "tokens.npy"), np.load(models / "mask.npy")
    lengths = mask.sum(1).astype(int) if kind == "masked" else np.full(len(tokens), 24)
    with torch.no_grad():
        for row, length in zip(tokens, lengths, strict=True):
            if length:
                model(torch.as_tensor(row[:length])[None])
    return sums / np.maximum(counts, 1), counts


def difference(found, expected):
    """The largest difference, relative to the largest score of its row; rows of zeros must be equal."""
    largest = np.abs(expected).max(axis=-1, keepdims=True)
    return (np.abs(found - expected) / np.where(largest, largest, 1)).max()


@pytest.mark.slow
@each
def test_reap_and_frequency_are_the_books_in_every_layout(case, kind, scores, models):
    found, one = scores(case["name"], kind), scores(f"{case['model']}-one", kind)
    reap, counts = by_the_book(models / case["model"], kind, models)
    assert difference(found.by_experts("reap")["experts"], reap) < SCORES_FLOAT64
    share = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    np.testing.assert_allclose(found.by_experts("frequency")["experts"], share, atol=1e-7)
    for name, expected in one.tensors.items():
        assert difference(found[name], expected) < SCORES_FP32, name
    assert difference(found["experts"], reap) > 1e-2  # under l2,l2 it is another score


@pytest.mark.slow
def test_the_name_stays_with_the_scores(scores, tmp_path):
    made = scores("plain-one", "plain").by_experts("reap")
    made.save(tmp_path / "s.safetensors")
    loaded = Scores.load(tmp_path / "s.safetensors")
    assert loaded.notes["experts"] == "reap"
    np.testing.assert_array_equal(loaded.under("l2,l2")["experts"], made["experts"])
    np.testing.assert_allclose(loaded.merge(loaded)["experts"], made["experts"], rtol=1e-6)
    assert loaded.digest == made.digest != scores("plain-one", "plain").digest
    assert split_half(made)["experts"] != split_half(scores("plain-one", "plain"))["experts"]


def test_what_cannot_be_scored_so_is_refused(scores_of_no_experts):
    with pytest.raises(InputError, match=r"by 'reap' need activations of experts"):
        scores_of_no_experts.by_experts("reap")
    with pytest.raises(InputError, match=r"experts are not scored by 'reep'; did you mean 'reap'"):
        scores_of_no_experts.by_experts("reep")


@pytest.fixture
def scores_of_no_experts(models):
    from nemo_minitron.families import from_hf

    return Scores(from_hf(models / "plain"), {})


@pytest.mark.parametrize(
    "settings", [{"method": "taylor"}, {"method": "magnitude"}, {"axes": ("hidden",)}], ids=lambda s: next(iter(s))
)
def test_a_calibration_that_cannot_is_refused(settings, models):
    from nemo_minitron.families import from_hf

    with pytest.raises(InputError, match="experts by reap need a mixture's activations"):
        Calibration(experts="reap", **settings).check(from_hf(models / "plain"), Layout())
    Calibration(experts="reap").check(from_hf(models / "plain"), Layout())
