"""Mixtures of experts, folder to folder: whole experts, the neurons of each, and what lies around them."""

import json

import numpy as np
import pytest
from pico import pico_mixtral, raw_tensors, save_tensors
from plans_by_hand import HEADS, HIDDEN, LAYERS
from tolerances import LOGITS_PICO_FP32, SOLVED_FP32

from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.pruning import HFSource, prune, student_index
from nemo_minitron.pruning.compensation import solvable, solve

EXPERTS = {0: [0, 2, 3], 2: [1, 2, 3], 5: [0, 1, 3]}
NEURONS = {
    layer: {expert: sorted(int(i) for i in (np.arange(25) * 7 + 3 * layer + expert) % 40) for expert in kept}
    for layer, kept in EXPERTS.items()
}


def everything(source):
    """Cuts layers, hidden, heads, one expert of four in each layer, and 40 neurons of each expert to 25."""
    keep = {"layers": LAYERS, "hidden": HIDDEN, "heads": HEADS, "experts": EXPERTS, "expert_ffn": NEURONS}
    target = source.replace(
        num_layers=3, hidden_size=41, num_attention_heads=3, num_moe_experts=3, moe_ffn_hidden_size=25
    )
    return PrunePlan(source=source, target=target, keep=keep)


def slice_by_hand(tensors):
    """The same cut of Hugging Face's tensors with numpy alone."""
    student = {"model.norm.weight": tensors["model.norm.weight"][HIDDEN]}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        student[name] = tensors[name][:, HIDDEN]
    for new, old in enumerate(LAYERS):
        ours, theirs = f"model.layers.{new}.", f"model.layers.{old}."
        q = [8 * head + i for head in HEADS[old] for i in range(8)]
        for name in ("input_layernorm", "post_attention_layernorm"):
            student[f"{ours}{name}.weight"] = tensors[f"{theirs}{name}.weight"][HIDDEN]
        for name, rows in (("q", q), ("k", slice(None)), ("v", slice(None))):
            student[f"{ours}self_attn.{name}_proj.weight"] = tensors[f"{theirs}self_attn.{name}_proj.weight"][rows][
                :, HIDDEN
            ]
        student[f"{ours}self_attn.o_proj.weight"] = tensors[f"{theirs}self_attn.o_proj.weight"][HIDDEN][:, q]
        ours, theirs = f"{ours}block_sparse_moe.", f"{theirs}block_sparse_moe."
        student[f"{ours}gate.weight"] = tensors[f"{theirs}gate.weight"][EXPERTS[old]][:, HIDDEN]
        for e, origin in enumerate(EXPERTS[old]):
            ffn = NEURONS[old][origin]
            for w in ("w1", "w3"):
                student[f"{ours}experts.{e}.{w}.weight"] = tensors[f"{theirs}experts.{origin}.{w}.weight"][ffn][
                    :, HIDDEN
                ]
            student[f"{ours}experts.{e}.w2.weight"] = tensors[f"{theirs}experts.{origin}.w2.weight"][HIDDEN][:, ffn]
    return student


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name, strict=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_identity_is_byte_identical(tmp_path, dtype):
    teacher = pico_mixtral(tmp_path / "t", dtype=dtype)
    source = from_hf(teacher)
    student = prune(teacher, PrunePlan(source=source, target=source, keep={}), tmp_path / "s")
    assert_equal(raw_tensors(student), raw_tensors(teacher))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cut_is_slicing_by_hand(tmp_path, dtype):
    """Mutation tried: an expert's neurons looked up under its number in the student, not in the source."""
    teacher = pico_mixtral(tmp_path / "t", dtype=dtype)
    plan = everything(from_hf(teacher))
    plan.save(tmp_path / "plan.json")
    student = prune(teacher, tmp_path / "plan.json", tmp_path / "s")
    assert_equal(raw_tensors(student), slice_by_hand(raw_tensors(teacher)))
    assert from_hf(student) == plan.target
    assert PrunePlan.load(student / "minitron_plan.json") == plan


def test_each_expert_is_solved_anew_for_its_own_neurons(tmp_path):
    """Mutation tried: the teacher's expert of the student's number."""
    teacher = pico_mixtral(tmp_path / "t")
    source, plan = HFSource(teacher), everything(from_hf(teacher))
    origins = {name: origin for name, origin in solvable(plan) if "experts" in name}
    assert origins == {
        f"layers.{new}.experts.{e}.down.weight": f"layers.{old}.experts.{origin}.down.weight"
        for new, old in enumerate(LAYERS)
        for e, origin in enumerate(EXPERTS[old])
    }
    generator = np.random.default_rng(0)
    x = generator.normal(size=(200, 5)) @ generator.normal(size=(5, 40)) + generator.normal(size=(200, 40), scale=0.1)
    name, kept = "layers.1.experts.0.down.weight", NEURONS[2][1]
    w = raw_tensors(teacher)["model.layers.2.block_sparse_moe.experts.1.w2.weight"].view(np.float32)[HIDDEN]
    damping = np.sqrt(0.01 * np.mean(np.sum(x[:, kept] ** 2, axis=0)))
    rows = np.concatenate([x[:, kept], damping * np.eye(len(kept))])
    wanted = np.concatenate([x @ w.T, damping * w[:, kept].T])
    solved = solve(source, plan, name, x.T @ x)
    np.testing.assert_allclose(solved, np.linalg.lstsq(rows, wanted, rcond=None)[0].T, rtol=0, atol=SOLVED_FP32)
    student = prune(teacher, plan, tmp_path / "s", compensation=Compensation(plan.digest, {name: solved}))
    expected = slice_by_hand(raw_tensors(teacher))
    expected["model.layers.1.block_sparse_moe.experts.0.w2.weight"] = solved.view(np.uint32)
    assert_equal(raw_tensors(student), expected)


def test_transformers_loads_what_was_sliced_by_hand(tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    teacher = pico_mixtral(tmp_path / "t")
    student = prune(teacher, everything(from_hf(teacher)), tmp_path / "s")
    model, report = AutoModelForCausalLM.from_pretrained(student, output_loading_info=True)
    assert not any(report.values()), report
    config = AutoConfig.from_pretrained(student)
    assert (config.num_local_experts, config.num_experts_per_tok, config.intermediate_size) == (3, 2, 25)
    by_hand = AutoModelForCausalLM.from_config(config)
    sliced = slice_by_hand(raw_tensors(teacher))
    by_hand.load_state_dict({name: torch.from_numpy(array.view(np.float32).copy()) for name, array in sliced.items()})
    tokens = torch.arange(3, 35)[None] * 13 % 509
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, by_hand(tokens).logits)


def test_what_does_nothing_goes_without_changing_logits(tmp_path):
    """Neurons that write nothing are an exact cut; so are experts, where the router never chooses them."""
    import torch
    from transformers import AutoModelForCausalLM

    teacher = pico_mixtral(tmp_path / "t")
    source = from_hf(teacher)
    experts = {layer: [e for e in range(4) if e != layer % 4] for layer in range(6)}
    neurons = {
        layer: {e: [i for i in range(40) if i % 5 != (layer + e) % 5] for e in experts[layer]} for layer in experts
    }
    tensors = {name: tensor.view(np.float32) for name, tensor in raw_tensors(teacher).items()}
    tensors["model.embed_tokens.weight"][:, 0] = 50  # a channel that is large and positive for every token ...
    for layer in range(6):
        prefix = f"model.layers.{layer}."
        tensors[f"{prefix}post_attention_layernorm.weight"][0] = 1
        gate = tensors[f"{prefix}block_sparse_moe.gate.weight"]
        gate[:, 0] = 0
        gate[layer % 4, 0] = -100  # ... keeps the router from one expert
        for expert, kept in neurons[layer].items():
            gone = sorted(set(range(40)) - set(kept))
            tensors[f"{prefix}block_sparse_moe.experts.{expert}.w2.weight"][:, gone] = 0
    save_tensors(teacher, tensors)
    target = source.replace(num_moe_experts=3, moe_ffn_hidden_size=32)
    student = prune(
        teacher,
        PrunePlan(source=source, target=target, keep={"experts": experts, "expert_ffn": neurons}),
        tmp_path / "s",
    )
    tokens = torch.arange(3, 131)[None] * 13 % 509
    with torch.no_grad():
        before, after = (AutoModelForCausalLM.from_pretrained(f)(tokens).logits for f in (teacher, student))
    assert before.std() > 0.1
    torch.testing.assert_close(after, before, rtol=0, atol=LOGITS_PICO_FP32)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 10**12, "num_layers is 1000000000000; legal are 1 to 10000"),
        ("num_local_experts", 10**12, "num_moe_experts is 1000000000000; legal are 1 to 10000"),
        ("num_local_experts", 10_000, "60000 experts"),
    ],
)
def test_config_of_a_billion_parts_costs_nothing(tmp_path, field, value, message):
    folder = pico_mixtral(tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(InputError, match=message):
        HFSource(folder)


def mixed():
    """Layers 0, 2 and 4 of six are mixtures, beside a shared expert; the others are dense."""
    from test_architecture import smollm2

    return smollm2(
        num_layers=6, hidden_size=48, ffn_hidden_size=96, num_attention_heads=6, head_dim=8, vocab_size=509,
        num_moe_experts=4, moe_ffn_hidden_size=40, moe_shared_expert_intermediate_size=56,
        moe_shared_expert_gate=True, moe_layer_freq=2,
    )  # fmt: skip


def test_a_student_of_dense_and_mixed_layers():
    """Each kept layer stays what it was, and keeps what its kind has."""
    source = mixed()
    keep = {
        "layers": [1, 2, 4], "ffn": {1: [0, 95]}, "experts": {2: [1, 3], 4: [0, 1]},
        "expert_ffn": {2: {1: [0, 5], 3: [1, 2]}, 4: {0: [3, 4], 1: [38, 39]}},
        "shared_expert_ffn": {2: [7, 8, 9], 4: [0, 1, 55]},
    }  # fmt: skip
    sizes = {"ffn_hidden_size": 2, "num_moe_experts": 2, "moe_ffn_hidden_size": 2}
    target = source.keep_layers([1, 2, 4]).replace(**sizes, moe_shared_expert_intermediate_size=3)
    plan = PrunePlan(source=source, target=target, keep=keep)
    for name, shape in target.shapes().items():
        origin, index = student_index(plan, name)
        assert tuple(map(len, index)) == shape
        assert all(0 <= i[0] <= i[-1] < n for i, n in zip(index, source.shapes()[origin], strict=True))
    name, (rows, _) = student_index(plan, "layers.1.experts.1.gate.weight")
    assert (name, rows.tolist()) == ("layers.2.experts.3.gate.weight", [1, 2])
    name, (_, columns) = student_index(plan, "layers.2.shared_expert.down.weight")
    assert (name, columns.tolist()) == ("layers.4.shared_expert.down.weight", [0, 1, 55])
    assert student_index(plan, "layers.2.router.weight")[1][0].tolist() == [0, 1]
    assert student_index(plan, "layers.1.shared_expert.router.weight")[1][0].tolist() == [0]


def test_a_student_that_keeps_no_mixture():
    source = mixed()
    plan = PrunePlan(source=source, target=source.keep_layers([1, 5]), keep={"layers": [1, 5]})
    assert plan.target.num_moe_experts is None
    assert student_index(plan, "layers.1.gate.weight")[0] == "layers.5.gate.weight"


ALL = {layer: [0, 1] for layer in (0, 2, 4)}


@pytest.mark.parametrize(
    ("keep", "sizes", "message"),
    [
        ({"experts": {0: [0, 1]}}, {"num_moe_experts": 2}, r"one list for each kept layer that has it: \[0, 2, 4\]"),
        ({"experts": {n: [0, 1] for n in range(6)}}, {"num_moe_experts": 2}, "each kept layer that has it"),
        ({"experts": ALL | {4: [0, 4]}}, {"num_moe_experts": 2}, "experts of layer 4: index 4 is out of range"),
        ({}, {"num_moe_experts": 2}, "keeps no indices of 'experts'"),
        ({"expert_ffn": ALL}, {"moe_ffn_hidden_size": 2}, "layer 0 must have one list for each of"),
        (
            {"expert_ffn": {n: {0: [1], 1: [1]} for n in ALL}, "experts": {n: [1, 2] for n in ALL}},
            {"moe_ffn_hidden_size": 1, "num_moe_experts": 2},
            r"layer 0 must have one list for each of \[1, 2\]",
        ),
        (
            {"expert_ffn": {n: {e: [40] for e in range(4)} for n in ALL}},
            {"moe_ffn_hidden_size": 1},
            "expert_ffn of layer 0, expert 0: index 40 is out of range",
        ),
        ({"shared_expert_ffn": ALL}, {"moe_shared_expert_intermediate_size": 3}, "2 indices are kept"),
        ({}, {"moe_router_topk": 1}, "changes moe_router_topk from 2 to 1 but keeps no indices of 'experts_per_token'"),
        ({"experts_per_token": [1]}, {"moe_router_topk": 1}, r"'experts_per_token' is \[1\]; the first of them stay"),
        ({"experts_per_token": [0, 1]}, {"moe_router_topk": 1}, r"'experts_per_token' is \[0, 1\]; the first"),
        ({}, {"moe_layer_freq": 3}, "cannot change moe_layer_freq"),
    ],
)
def test_illegal_selections(keep, sizes, message):
    with pytest.raises(InputError, match=message):
        PrunePlan(source=mixed(), target=mixed().replace(**sizes), keep=keep)


def test_axes_that_a_model_lacks_are_refused():
    every = mixed().replace(moe_layer_freq=1)
    with pytest.raises(InputError, match=r"'ffn', which the model does not have; it has .*expert_ffn"):
        PrunePlan(source=every, target=every, keep={"ffn": {n: list(range(40)) for n in range(6)}})
