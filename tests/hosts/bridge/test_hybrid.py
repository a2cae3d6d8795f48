"""Nemotron-H on Megatron-Bridge: the folder's bits, transformers' logits and scores in every layout, and its cuts by
hand.

On a CPU transformers sums the states of chunks over the wrong dimension (transformers#47246): what enters the second
chunk is too large by a factor of 1 + the decay over it. So it gets one chunk, longer than a sample; Megatron has two.
"""

import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from command_line import minitron
from hybrid_cut import CHANNELS, HEADS, KEEP, LAYERS, MAMBA, STUDENT, by_hand
from pico import pico_nemotron_h, raw_tensors
from ranks import run_ranks
from tolerances import (
    BF16_SCORES,
    FIRST_GRADIENT_FP32,
    GRAM_FP32,
    LOGITS_PICO_FP32,
    SCORES_FLOAT64,
    SCORES_FP32,
    TOKENS_KL_FP32,
)
from words import save_tokenizer

from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.pruning import prune
from nemo_minitron.pruning.compensation import fold_norms, head_residual
from nemo_minitron.search import plan
from nemo_minitron.sources.folder import HFSource
from nemo_minitron.sources.tensors import whole

WORKER = Path(__file__).with_name("hybrid_worker.py")
BRIDGE = any(name == "megatron-bridge" for names in metadata.packages_distributions().values() for name in names)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BRIDGE, reason="Megatron-Bridge is not installed here")]

CASES = [
    {"name": name, "layout": layout}
    for name, layout in {"dp": {"dp": 2}, "tp": {"tp": 2}, "tp-sp": {"tp": 2, "sp": True}, "pp": {"pp": 2}}.items()
]
CASES += [{"name": "cp", "layout": {"cp": 2}}]
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    source = from_hf(pico_nemotron_h(folder / "teacher", **SIZES))
    cut = PrunePlan(source, source.keep_layers(LAYERS).replace(**STUDENT), KEEP)
    cut.save(folder / "plan.json")
    prune(folder / "teacher", cut, folder / "student")
    np.save(folder / "tokens.npy", np.random.default_rng(3).integers(0, 509, (4, 24)))
    return folder


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("world2")
    run_ranks(2, WORKER, models, json.dumps(CASES), out)
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_folders_bits_live_and_in_a_checkpoint(case, results):
    found = json.loads((results / f"{case['name']}.json").read_text())
    assert [found.pop(name) for name in ("teacher", "student")] == [[], []]
    assert [found.pop(f"{name}-saved") for name in ("teacher", "student")] == [[[], []]] * 2
    assert all(found.values())  # the live model's Architecture is the folder's


def reference(folder, dtype):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), chunk_size=32).eval()


@pytest.mark.parametrize("name", ["dp", "tp", "tp-sp"])
@pytest.mark.parametrize("model", ["teacher", "student"])
def test_transformers_logits(name, model, models, results):
    import torch

    with torch.no_grad():
        expected = reference(models / model, "float32")(torch.from_numpy(np.load(models / "tokens.npy"))).logits.numpy()
    found = np.load(results / f"{name}.npz")[model]
    assert expected.std() > 0.1
    assert np.abs(found - expected).max() < LOGITS_PICO_FP32


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_moments_of_the_stream(case, models, results):
    """In front of the norm of each layer, of whatever kind it is, and of the final one."""
    import torch

    model, seen = reference(models / "teacher", "float64"), []
    norms = [*(layer.norm for layer in model.model.layers), model.model.norm_f]
    for norm in norms:
        norm.register_forward_pre_hook(lambda m, given: seen.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        model(torch.from_numpy(np.load(models / "tokens.npy")))
    assert len(seen) == len(norms)
    unit = torch.cat([x / x.square().mean(-1, keepdim=True).sqrt() for x in seen])
    expected = (unit.T @ unit / len(unit)).numpy()
    found = np.load(results / f"{case['name']}.npz")["stream"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=GRAM_FP32 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["dp", "tp-sp", "cp"])
def test_inputs_of_the_matrices_that_are_fitted_again(name, models, results):
    import torch

    model, wanted = reference(models / "teacher", "float64"), {}
    for layer, kind, linear in ((3, "o", "o_proj"), (1, "down", "down_proj"), (4, "down", "down_proj")):
        place = f"gram of layers.{layer}.{kind}.weight"
        of_layer = getattr(model.model.layers[layer].mixer, linear)
        of_layer.register_forward_pre_hook(lambda m, given, at=place: wanted.update({at: given[0].flatten(0, 1)}))
    with torch.no_grad():
        model(torch.from_numpy(np.load(models / "tokens.npy")))
    found = np.load(results / f"{name}.npz")
    assert {place for place in found.files if place.startswith("gram")} == wanted.keys()
    for place, x in wanted.items():
        expected = (x.T @ x).numpy()
        assert np.abs(found[place] - expected).max() < GRAM_FP32 * np.abs(expected).max()


def test_the_loss_of_a_distillation_and_its_gradients_are_transformers(models, results, tmp_path):
    """Forward KL in float64; of the mixer's own numbers transformers computes some in fp32."""
    import torch
    import torch.nn.functional as F

    teacher, student = (reference(models / name, "float64") for name in ("teacher", "student"))
    tokens = torch.from_numpy(np.load(models / "tokens.npy"))
    with torch.no_grad():
        target = F.log_softmax(teacher(tokens).logits, -1)
    kl = (target.exp() * (target - F.log_softmax(student(tokens).logits, -1))).sum(-1)
    kl.sum().backward()
    found = np.load(results / "dp.npz")
    np.testing.assert_allclose(found["kl"], kl.detach().numpy(), rtol=0, atol=TOKENS_KL_FP32)
    for parameter in student.parameters():
        parameter.data = parameter.grad.float()
    student.float().save_pretrained(tmp_path)
    gradients, shapes = HFSource(tmp_path), from_hf(models / "student").shapes()
    for name, shape in shapes.items():
        expected, own = (raw.view("f4") for raw in (gradients.read(name, whole(shape)), found[f"gradient of {name}"]))
        assert np.abs(own - expected).max() < FIRST_GRADIENT_FP32 * np.abs(expected).max(), name


def test_every_cut_is_the_one_by_hand(models):
    rename = {"backbone.embedding.weight": "backbone.embeddings.weight"}
    teacher = {rename.get(name, name): tensor for name, tensor in raw_tensors(models / "teacher").items()}
    wanted, found = by_hand(teacher), raw_tensors(models / "student")
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not np.array_equal(found[name], wanted[name])] == []


def test_what_a_cut_gets_beyond_slices(models):
    """sqrt(48 / 40) in the norms over hidden channels, none in the gated ones; the residual of heads in attention."""
    source, cut = HFSource(models / "teacher"), PrunePlan.load(models / "plan.json")
    plain, shapes = HFSource(models / "student"), cut.target.shapes()
    folded = fold_norms(source, cut)
    assert folded.keys() == {"final_norm.weight", *(f"layers.{layer}.input_norm.weight" for layer in range(4))}
    for name, values in folded.items():
        sliced = plain.read(name, whole(shapes[name])).view("f4")
        np.testing.assert_allclose(values, sliced * np.sqrt(48 / 40), rtol=1e-6)
    halved = plan(Scores(source.architecture, {}), {"layers": LAYERS, "query_groups": 4})
    assert halved.target == source.architecture.keep_layers(LAYERS)
    scores = np.arange(48, dtype=np.float32).reshape(6, 8)  # of each pair the second head stays
    fewer = PrunePlan(
        source.architecture,
        halved.target.replace(num_attention_heads=4),
        {"layers": LAYERS, "heads": {3: [1, 3, 5, 7]}},
    )
    ((name, residual),) = head_residual(source, fewer, scores).items()
    q = source.read("layers.3.q.weight", whole((64, 48))).view("f4").reshape(4, 2, 8, 48)
    assert name == "layers.2.q.weight"
    np.testing.assert_allclose(residual, (2 * q[:, 1] - q[:, 0]).reshape(32, 48), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case["name"])
def test_scores_of_a_layout_are_one_processs(case, results):
    one, found = np.load(results / "dp.npz"), np.load(results / f"{case['name']}.npz")
    names = [name for name in one.files if "-" in name and not name.startswith(("bf16", "shorter"))]
    assert {"activation-mamba_heads", "activation-mamba_head_dim", "activation-layers", "taylor-mamba_heads"} <= {
        *names
    }
    for name in names:
        largest = np.abs(one[name]).max(-1, keepdims=True)
        assert np.all(np.abs(found[name] - one[name]) <= SCORES_FP32 * largest), name


def test_a_hybrid_whose_last_layer_is_an_mlp_has_scores_of_every_layer(results):
    """As the published models end. No layer's activations depend on the layers behind it."""
    one = np.load(results / "dp.npz")
    assert not one["shorter activation-mamba_heads"][[1, 3, 4]].any()
    for axis in ("mamba_heads", "mamba_head_dim", "heads", "query_groups", "ffn", "layers"):
        np.testing.assert_allclose(one[f"shorter activation-{axis}"], one[f"activation-{axis}"][:5], rtol=SCORES_FP32)


def test_samples_of_a_packed_row_have_the_scores_that_they_have_alone(results):
    """No convolution and no state passes from one to the next, in any layout."""
    one = np.load(results / "dp.npz")
    wanted = {name.removeprefix("alone "): one[name] for name in one.files if name.startswith("alone ")}
    assert {"mamba_heads", "mamba_head_dim", "layers", "hidden", "heads", "ffn"} <= wanted.keys()
    for layout in ("dp", "tp", "tp-sp", "pp"):
        found = np.load(results / f"{layout}.npz")
        for name, score in wanted.items():
            largest = np.abs(score).max(-1, keepdims=True)
            assert np.all(np.abs(found[f"packed {name}"] - score) <= SCORES_FP32 * largest), (layout, name)


@pytest.mark.parametrize("name", ["dp", "tp", "tp-sp", "pp"])
def test_scores_in_bf16_are_those_in_fp32(name, results):
    """In every layout, relative to the layer's largest; of one process's bf16 they differ by as much at most."""
    one, found = np.load(results / "dp.npz"), np.load(results / f"{name}.npz")
    names = [name.removeprefix("bf16 ") for name in found.files if name.startswith("bf16")]
    assert {"activation-mamba_heads", "activation-layers", "activation-hidden"} <= {*names}
    for name in names:
        largest = np.abs(one[name]).max(-1, keepdims=True)
        assert not np.array_equal(found[f"bf16 {name}"], one[name])
        assert np.all(np.abs(found[f"bf16 {name}"] - one[name]) <= BF16_SCORES * largest), name


def test_scores_are_transformers_in_float64(models, results):
    """The part x of the projection: mean over the sequence, L2 over the samples, L2 over channels or heads."""
    import torch

    model, seen = reference(models / "teacher", "float64"), {}
    for layer in (0, 2, 5):
        block = model.model.layers[layer]
        block.mixer.in_proj.register_forward_hook(lambda m, given, out, i=layer: seen.update({i: out[..., 48:96]}))
        block.register_forward_hook(lambda m, given, out, i=layer: seen.update({f"{i}-layer": (given[0], out)}))
    with torch.no_grad():
        model(torch.from_numpy(np.load(models / "tokens.npy")))
    found = np.load(results / "dp.npz")
    for layer in (0, 2, 5):
        by_channel = seen[layer].abs().mean(1).square().sum(0).sqrt().view(8, 6)
        for name, dim in (("mamba_heads", 1), ("mamba_head_dim", 0)):
            wanted = by_channel.norm(dim=dim).numpy()
            np.testing.assert_allclose(found[f"activation-{name}"][layer], wanted, atol=SCORES_FLOAT64 * wanted.max())
        before, after = seen[f"{layer}-layer"]
        influence = 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
        assert found["activation-layers"][layer] == pytest.approx(float(influence), rel=1e-4)
    assert not found["activation-mamba_heads"][[1, 3, 4]].any()


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ({"mamba_heads": {0: [0, 1, 2, 3, 4, 5], 5: MAMBA[5]}}, r"each group must keep 3 of its 4 heads"),
        ({"mamba_heads": {0: MAMBA[0]}}, r"one list for each kept layer that has it: \[0, 5\]"),
        ({"heads": HEADS | {1: [0]}}, r"one list for each kept layer that has it: \[3\]"),
        ({"mamba_head_dim": {0: [0, 1], 5: CHANNELS[5]}}, "mamba_head_dim"),
    ],
)
def test_a_plan_that_is_none_is_refused(keep, words, models):
    source = from_hf(models / "teacher")
    with pytest.raises(InputError, match=words):
        PrunePlan(source, source.keep_layers(LAYERS).replace(**STUDENT), KEEP | keep)


def test_the_three_commands(models):
    """estimate in two layouts, plan and prune; transformers runs the student, which has what was planned."""
    import torch

    texts = [f"the model number {i} reads {i * 7} words and ends." for i in range(90)]
    save_tokenizer(models / "teacher", texts, 509)
    (models / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    rows = ("--data", "text.jsonl", "--samples", 4, "--sequence-length", 32, "--precision", "fp32")
    sizes, plans = "hidden=40,ffn=80,mamba_heads=6,mamba_head_dim=4", {}
    depths = {"listed": "layers=0-1+3+5", "kinds": "mamba_layers=2,attention_layers=1,mlp_layers=1"}
    for out, layout in (("one", ()), ("two", ("--tp", 2))):
        minitron(models, "estimate", "teacher", *rows, *layout, "--out", f"{out}.safetensors")
        for name, depth in depths.items():
            minitron(models, "plan", f"{out}.safetensors", "--keep", f"{depth},{sizes}", "--out", f"{out}-{name}.json")
            plans[out, name] = PrunePlan.load(models / f"{out}-{name}.json")
    assert all(plans["one", name].keep == plans["two", name].keep for name in depths)
    minitron(models, "prune", "teacher", "one-listed.json", "cut")
    wanted = {"hidden_size": 40, "ffn_hidden_size": 80, "mamba_num_heads": 6, "mamba_head_dim": 4}
    source = from_hf(models / "teacher")
    assert from_hf(models / "cut") == plans["one", "listed"].target == source.keep_layers(LAYERS).replace(**wanted)
    influence = Scores.load(models / "one.safetensors")["layers"]
    best = [sorted(kind, key=lambda layer: -influence[layer])[:count] for kind, count in (([0, 2, 5], 2), ([1, 4], 1))]
    assert plans["one", "kinds"].keep["layers"] == sorted([*best[0], *best[1], 3])
    with torch.no_grad():
        assert reference(models / "cut", "float32")(torch.arange(24)[None]).logits.isfinite().all()
