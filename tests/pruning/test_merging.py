"""Dropped experts, merged into the kept ones most like them: against numbers by hand, and in transformers."""

import itertools
import json
import sys

import forked
import numpy as np
import pytest
from pico import pico_llama, pico_qwen3_moe, raw_tensors
from scipy.optimize import linear_sum_assignment
from tolerances import LOGITS_PICO_FP32

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Compensation, PrunePlan, Scores
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.pruning import HFSource
from nemo_minitron.pruning.merging import Merged, match, merge_experts, nearest_kept, shares
from nemo_minitron.pruning.student import Student
from nemo_minitron.sources.tensors import whole

PARTS = ("gate.weight", "gate.bias", "up.weight", "up.bias", "down.weight", "down.bias")
LAYERS, HIDDEN, EXPERTS = [0, 2], [0, 1, 3, 4, 6, 7, 9], {0: [1, 4], 2: [0, 3]}


class Memory:
    """A source of random numbers in memory."""

    def __init__(self, architecture):
        generator = np.random.default_rng(3)
        self.architecture = architecture
        self.tensors = {n: generator.normal(size=s).astype(np.float32) for n, s in architecture.shapes().items()}

    def dtype(self, name):
        return "F32"

    def read(self, name, index):
        return self.tensors[name][np.ix_(*index)].view(np.uint32)

    def expert(self, layer, expert):
        prefix = f"layers.{layer}.experts.{expert}."
        return {part: self.tensors[prefix + part] for part in PARTS if prefix + part in self.tensors}


def mixture(**sizes):
    """Layers 0 and 2 of three are mixtures of six experts."""
    usual = {"num_layers": 3, "hidden_size": 10, "ffn_hidden_size": 12, "num_attention_heads": 2, "head_dim": 4}
    usual |= {"num_query_groups": 2, "vocab_size": 11, "num_moe_experts": 6, "moe_ffn_hidden_size": 5}
    return Architecture(**usual | {"moe_layer_freq": (1, 0, 1)} | sizes)


def halved(a, kept=EXPERTS, **more):
    keep = {"experts": kept} | more
    sizes = {"num_moe_experts": 2} | ({"hidden_size": len(HIDDEN)} if "hidden" in keep else {})
    sizes |= {"moe_ffn_hidden_size": 3} if "expert_ffn" in keep else {}
    target = a.keep_layers(keep["layers"]) if "layers" in keep else a
    return PrunePlan(a, target.replace(**sizes), keep)


def scores_of(a, counts):
    """Scores in which so many tokens came to each expert of each layer, in two halves."""
    halves = np.stack([np.asarray(counts, float) - 1, np.ones_like(counts, float)], 1)
    states = {"experts/routed,mean/count": halves, "experts/routed,mean/sum": halves * 0.5}
    return Scores(a, {"experts": np.zeros((a.num_layers, a.num_moe_experts), np.float32)}, states=states)


COUNTS = np.arange(2, 20).reshape(3, 6) ** 2


def test_nearest_by_hand():
    """By the angle, not by length or distance; of equal ones the first; a row of zeros is like all."""
    rows = np.array([[1, 0], [0, 8], [9, 8], [0.1, 0.2], [-1, -0.1], [1, 1], [0, 0]])
    assert nearest_kept(rows, [0, 1]) == {2: 0, 3: 1, 4: 1, 5: 0, 6: 0}


def test_a_router_s_groups_stay_apart():
    rows = np.array([[1, 0], [0, 1], [1, 0.1], [0, 1], [1, 0], [0.1, 1]])
    assert nearest_kept(rows, [0, 3], groups=2) == {1: 0, 2: 0, 4: 3, 5: 3}
    assert nearest_kept(rows, [0, 3]) == {1: 3, 2: 0, 4: 0, 5: 3}


def test_matched_by_all_orders():
    """The assignment against every one: three of five neurons, two matrices and a bias."""
    generator = np.random.default_rng(0)
    ours, theirs = ([generator.normal(size=(n, c)) for c in (4, 2, 1)] for n in (3, 5))
    pairs = list(zip(ours, theirs, strict=True))
    distance = {o: sum(((a - b[list(o)]) ** 2).sum() for a, b in pairs) for o in itertools.permutations(range(5), 3)}
    assert tuple(match(pairs)) == min(distance, key=distance.get)


@pytest.mark.parametrize(
    ("frequency", "expected"), [([0.3, 0.1], [0.75, 0.25]), ([0, 0.2, 0.2], [0, 0.5, 0.5]), ([0, 0], [1, 0])]
)
def test_shares(frequency, expected):
    np.testing.assert_allclose(shares(np.array(frequency)), expected, rtol=1e-15)


@pytest.mark.parametrize("biases", [False, True])
def test_a_permuted_copy_merges_to_itself(biases):
    """Exactly, whatever the shares. Mutations tried: no matching; columns of down left in their order."""
    source = Memory(mixture(mlp_bias=biases))
    generator = np.random.default_rng(1)
    for layer, kept in EXPERTS.items():
        router = source.tensors[f"layers.{layer}.router.weight"]
        for expert, leader in zip([e for e in range(6) if e not in kept], kept * 2, strict=True):
            order = generator.permutation(5)
            router[expert] = 3 * router[leader]
            for part, values in source.expert(layer, leader).items():
                if part != "down.bias":
                    values = values[:, order] if part == "down.weight" else values[order]
                source.tensors[f"layers.{layer}.experts.{expert}.{part}"][:] = values
    plan = halved(source.architecture)
    merged = merge_experts(source, plan, scores_of(source.architecture, COUNTS))
    assert len(merged) == 2 * 2 * (6 if biases else 3)
    slices = Student(source, plan)
    for name, tensor in merged.items():
        np.testing.assert_array_equal(tensor.view(np.uint32), slices.read(name, whole(tensor.shape)), err_msg=name)


def by_hand(source, plan, layer, leader, joined, counts):
    """The average of a group, from whole experts, by an independent matching of what stays of the kept one."""
    hidden = plan.keep.get("hidden", list(range(10)))
    neurons = plan.keep["expert_ffn"][layer][leader] if "expert_ffn" in plan.keep else list(range(5))
    total, kept = {}, None
    for expert, count in zip((leader, *joined), counts, strict=True):
        parts = {part: values.astype(float) for part, values in source.expert(layer, expert).items()}
        parts |= {part: parts[part][:, hidden] for part in ("gate.weight", "up.weight") if part in parts}
        parts |= {part: parts[part][hidden] for part in ("down.weight", "down.bias") if part in parts}
        of_neurons = {part: values for part, values in parts.items() if part != "down.bias"}
        of_neurons["down.weight"] = parts["down.weight"].T
        rows = np.concatenate([values.reshape(5, -1) for values in of_neurons.values()], 1)
        kept = rows[neurons] if kept is None else kept
        order = linear_sum_assignment(((kept[:, None] - rows) ** 2).sum(-1))[1] if expert != leader else neurons
        cut = parts | {part: values[order] for part, values in of_neurons.items()}
        cut["down.weight"] = cut["down.weight"].T
        total = {part: total.get(part, 0) + values * count / sum(counts) for part, values in cut.items()}
    return total


CUTS = {
    "experts alone": ({}, {}),
    "biases": ({"mlp_bias": True}, {}),
    "no gate": ({"gated_mlp": False}, {}),
    "a shared expert, a router's groups and correction": (
        {"moe_shared_expert_intermediate_size": 8, "moe_router_num_groups": 2, "moe_router_enable_expert_bias": True},
        {},
    ),
    "width and depth": (
        {"mlp_bias": True},
        {"layers": LAYERS, "hidden": HIDDEN,
         "expert_ffn": {0: {1: [0, 2, 3], 4: [1, 2, 4]}, 2: {0: [0, 1, 2], 3: [2, 3, 4]}}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CUTS)
def test_averages_by_hand(name):
    sizes, more = CUTS[name]
    source = Memory(mixture(**sizes))
    a = source.architecture
    plan = halved(a, **more)
    merged, seen = merge_experts(source, plan, scores_of(a, COUNTS)), set()
    for layer, kept in EXPERTS.items():
        router = source.tensors[f"layers.{layer}.router.weight"]
        joins = nearest_kept(router, kept, a.moe_router_num_groups or 1)
        assert not a.moe_router_num_groups or all(e // 3 == k // 3 for e, k in joins.items())
        for place, leader in enumerate(kept):
            joined = [e for e in joins if joins[e] == leader]
            prefix = f"layers.{plan.kept_layers.index(layer)}.experts.{place}."
            expected = by_hand(source, plan, layer, leader, joined, COUNTS[layer][[leader, *joined]])
            for part, values in expected.items() if joined else ():
                np.testing.assert_allclose(merged[prefix + part], values, rtol=0, atol=1e-6, err_msg=prefix + part)
                seen.add(prefix + part)
    assert set(merged) == seen
    Compensation(plan.digest, merged).check(plan)  # the shapes are the student's, and all else is a slice


def test_an_expert_that_nothing_joins_is_a_slice():
    source = Memory(mixture())
    for layer in EXPERTS:
        router = source.tensors[f"layers.{layer}.router.weight"]
        router[:] = router[EXPERTS[layer][0]]
        router[EXPERTS[layer][1]] *= -1
    merged = merge_experts(source, halved(source.architecture), scores_of(source.architecture, COUNTS))
    assert {name.split(".")[3] for name in merged} == {"0"}
    assert merged.described() == {"0": {"1": [0, 2, 3, 5]}, "2": {"0": [1, 2, 4, 5]}}


def test_a_file_holds_what_is_made_one_by_one(tmp_path, monkeypatch):
    """A tensor at a time: none is made for the header, and each once for the file."""
    source, made = Memory(mixture(mlp_bias=True)), []
    plan = halved(source.architecture)
    merged = merge_experts(source, plan, scores_of(source.architecture, COUNTS))
    monkeypatch.setattr(Merged, "make", lambda self, name, make=Merged.make: made.append(name) or make(self, name))
    both = Compensation(plan.digest, {"final_norm.weight": np.ones(10, np.float32)}).joined(merged, {"merged": True})
    both.check(plan)
    assert not made
    both.save(tmp_path / "c.safetensors")
    assert sorted(made) == sorted(merged)
    found = Compensation.load(tmp_path / "c.safetensors")
    assert found.notes == {"merged": True}
    assert set(found.tensors) == {*merged, "final_norm.weight"}
    for name in merged:
        np.testing.assert_array_equal(found.tensors[name], merged[name], err_msg=name, strict=True)


def test_refusals():
    source = Memory(mixture())
    a = source.architecture
    plan, scores = halved(a), scores_of(a, COUNTS)
    dense = a.replace(num_moe_experts=None, moe_ffn_hidden_size=None, moe_layer_freq=1)
    with pytest.raises(InputError, match="the model has no experts to merge"):
        merge_experts(source, PrunePlan(dense, dense, {}), scores)
    with pytest.raises(InputError, match="the plan drops no experts"):
        merge_experts(source, PrunePlan(a, a, {}), scores)
    with pytest.raises(InputError, match="another model"):
        merge_experts(source, plan, scores_of(mixture(vocab_size=12), COUNTS))
    with pytest.raises(InputError, match="need activations of experts, and these scores have none"):
        merge_experts(source, plan, Scores(a, {"experts": np.zeros((3, 6), np.float32)}))
    source.tensors["layers.2.experts.1.up.weight"][0, 0] = np.nan
    merged = merge_experts(source, plan, scores)
    with pytest.raises(InputError, match=r"'layers.2.experts.1.up.weight' holds a number that is not finite"):
        list(merged.values())
    source.tensors["layers.2.router.weight"][0, 0] = np.inf
    with pytest.raises(InputError, match=r"'layers.2.router.weight' holds a number that is not finite"):
        merge_experts(source, plan, scores)


# -- the command, on a model in transformers --------------------------------------------------------------
def minitron(folder, *arguments):
    return forked.run([sys.executable, "-m", "nemo_minitron.cli", "prune", *map(str, arguments)], cwd=folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Qwen3-MoE, a plan that drops two of four experts, and scores."""
    folder = tmp_path_factory.mktemp("merging")
    a = from_hf(pico_qwen3_moe(folder / "teacher", num_hidden_layers=2))
    plan = PrunePlan(a, a.replace(num_moe_experts=2), {"experts": {0: [0, 2], 1: [1, 3]}})
    plan.save(folder / "plan.json")
    scores_of(a, [[8, 3, 5, 9], [2, 6, 4, 7]]).save(folder / "scores.safetensors")
    return folder


WEIGHTS = ("gate", "up", "down")


def hand_made(folder, plan):
    """Hugging Face's tensors of the student, averaged with numpy alone."""
    tensors = {n: t.view(np.float32).astype(float) for n, t in raw_tensors(folder / "teacher").items()}
    student = {n: t for n, t in tensors.items() if ".mlp." not in n}
    for layer, kept in plan.keep["experts"].items():
        prefix = f"model.layers.{layer}.mlp."
        router, counts = tensors[f"{prefix}gate.weight"], {0: [8, 3, 5, 9], 1: [2, 6, 4, 7]}[layer]
        cosines = router @ router.T / np.linalg.norm(router, axis=1) / np.linalg.norm(router, axis=1)[:, None]
        student[f"{prefix}gate.weight"] = router[kept]
        experts = [{w: tensors[f"{prefix}experts.{e}.{w}_proj.weight"] for w in WEIGHTS} for e in range(4)]
        rows = [np.concatenate([expert["gate"], expert["up"], expert["down"].T], 1) for expert in experts]
        for place, leader in enumerate(kept):
            members = [e for e in range(4) if e == leader or (e not in kept and cosines[e][kept].argmax() == place)]
            for w in WEIGHTS:
                parts = []
                for e in members:
                    order = linear_sum_assignment(((rows[leader][:, None] - rows[e]) ** 2).sum(-1))[1]
                    values = experts[e][w][:, order] if w == "down" else experts[e][w][order]
                    parts.append(values * counts[e] / sum(counts[m] for m in members))
                student[f"{prefix}experts.{place}.{w}_proj.weight"] = sum(parts)
    return {name: values.astype(np.float32) for name, values in student.items()}


def test_a_student_of_merged_experts(world):
    """In transformers it has the logits of the average by hand; the record names the groups."""
    import torch
    from transformers import AutoModelForCausalLM

    done = minitron(world, "teacher", "plan.json", "merged", "--merge-experts", "--scores", "scores.safetensors")
    assert done.returncode == 0, done.stderr
    plan, tokens = PrunePlan.load(world / "plan.json"), torch.arange(3, 67)[None] * 13 % 509
    model, report = AutoModelForCausalLM.from_pretrained(world / "merged", output_loading_info=True)
    assert not any(report.values()), report
    note = json.loads((world / "merged" / "minitron_compensation.json").read_text())
    merged = merge_experts(HFSource(world / "teacher"), plan, Scores.load(world / "scores.safetensors"))
    assert note == {"tensors": sorted(merged), "merged experts": merged.described()}
    average = AutoModelForCausalLM.from_config(model.config)
    average.load_state_dict({name: torch.from_numpy(values) for name, values in hand_made(world, plan).items()})
    with torch.no_grad():
        found, expected = model(tokens).logits, average(tokens).logits
    assert torch.isfinite(found).all()
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGITS_PICO_FP32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["teacher", "plan.json", "s", "--merge-experts"], "--merge-experts need --scores"),
        (["teacher", "whole.json", "s", "--merge-experts", "--scores", "scores.safetensors"], "drops no experts"),
        (["dense", "dense.json", "s", "--merge-experts", "--scores", "scores.safetensors"], "has no experts to merge"),
        (
            ["teacher", "narrow.json", "s", "--merge-experts", "--scores", "scores.safetensors",
             "--compensation", "c.safetensors"],
            "leave one of them out",
        ),
    ],
)  # fmt: skip
def test_refused_at_the_command_line(world, arguments, words):
    a = from_hf(world / "teacher")
    PrunePlan(a, a, {}).save(world / "whole.json")
    neurons = {layer: {e: list(range(24)) for e in kept} for layer, kept in {0: [0, 2], 1: [1, 3]}.items()}
    keep = {"experts": {0: [0, 2], 1: [1, 3]}, "expert_ffn": neurons}
    narrow = PrunePlan(a, a.replace(num_moe_experts=2, moe_ffn_hidden_size=24), keep)
    narrow.save(world / "narrow.json")
    solved = {"layers.0.experts.0.down.weight": np.zeros((48, 24), np.float32)}
    Compensation(narrow.digest, solved).save(world / "c.safetensors")
    if arguments[0] == "dense":
        dense = from_hf(pico_llama(world / "dense", num_hidden_layers=2))
        PrunePlan(dense, dense, {}).save(world / "dense.json")
    done = minitron(world, *arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (world / "s").exists()
