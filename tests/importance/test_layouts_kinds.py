"""Scores of every kind of model in every layout: one process against the book, each layout against one process.

Mixtures of experts, multi-latent attention, QK norms, LayerNorms with biases, ungated MLPs; activations and Taylor.
Every case's ranks are real processes; `kinds_worker.py` says what they do. Expert and tensor parallelism without
sequence parallelism is no case: Megatron-core 0.15.3 does not build it.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from kinds_worker import CRITERIA, EXTRA, axes_of
from ranks import run_ranks
from tolerances import SCORES_FLOAT64, SCORES_FP32

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Scores, criteria

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "kinds_worker.py"
PLAIN, MASKED, PACKED = "plain", "masked", "packed"
ALL = (PLAIN, MASKED, PACKED)
GATHER = {"options": {"moe_token_dispatcher_type": "allgather"}}
SP = {"sp": True}
# World size -> kind of model, layout, kinds of batches, what else; a new layout is one entry.
LAYOUTS = {
    1: [
        ("moe", {}, ALL, {"taylor": ALL}),
        ("mla_moe", {}, ALL, {"taylor": (PLAIN,)}),
        ("mla", {}, ALL, {"taylor": (PACKED,)}),
        ("qk_norm", {}, ALL, {}),
        ("nemotron", {}, ALL, {"taylor": (MASKED,)}),
        ("gpt", {}, (PLAIN, MASKED), {}),
    ],
    2: [
        ("moe", {"tp": 2}, ALL, {"taylor": (MASKED,)}),  # the experts' tensor parallelism is the other layers'
        ("moe", {"tp": 2, **SP}, ALL, {"taylor": (PLAIN, PACKED)}),
        ("moe", {"tp": 2, **SP}, (MASKED,), GATHER),
        ("moe", {"tp": 2, "etp": 1}, (MASKED,), {"taylor": (MASKED,)}),
        ("moe", {"tp": 2, "etp": 1, **SP}, (MASKED, PACKED), {"taylor": (MASKED,)}),
        ("moe", {"tp": 2, "ep": 2, "etp": 1, **SP}, (PLAIN, MASKED), {}),
        ("moe", {"ep": 2}, ALL, {"taylor": (MASKED,)}),
        ("moe", {"ep": 2}, (MASKED, PACKED), GATHER),
        ("moe", {"ep": 2}, (MASKED,), {"grouped": True}),
        ("moe", {"dp": 2}, ALL, {"taylor": (MASKED,)}),
        ("moe", {"cp": 2}, (PLAIN, MASKED), {"taylor": (MASKED,)}),
        ("moe", {"pp": 2}, (MASKED, PACKED), {"taylor": (MASKED,)}),
        ("moe", {"pp": 2, "vp": 2}, (PLAIN,), {}),
        ("mla_moe", {"tp": 2, **SP}, ALL, {"taylor": (PLAIN,)}),
        ("mla_moe", {"ep": 2}, (MASKED,), {}),
        ("mla", {"tp": 2}, ALL, {"taylor": (PACKED,)}),
        ("mla", {"tp": 2, **SP}, ALL, {}),
        ("mla", {"cp": 2}, (MASKED,), {}),
        ("mla", {"pp": 2}, (PLAIN,), {}),
        ("qk_norm", {"tp": 2}, (PLAIN,), {}),
        ("qk_norm", {"tp": 2, **SP}, ALL, {}),
        ("nemotron", {"tp": 2, **SP}, (MASKED, PACKED), {"taylor": (MASKED,)}),
        ("gpt", {"tp": 2}, (PLAIN,), {}),
        ("gpt", {"pp": 2}, (MASKED,), {}),
    ],
    4: [
        ("moe", {"tp": 2, "ep": 2, **SP}, (MASKED, PACKED), {"taylor": (MASKED,)}),
        ("moe", {"tp": 2, "ep": 2, **SP}, (MASKED,), GATHER),
        ("moe", {"tp": 2, "ep": 2, **SP}, (MASKED,), {"grouped": True}),
        ("moe", {"tp": 2, "ep": 2, "etp": 1, "pp": 2, **SP}, (MASKED,), {}),
        ("moe", {"cp": 2, "ep": 2}, (MASKED,), {}),
        ("mla_moe", {"tp": 2, "ep": 2, "etp": 1, **SP}, (PACKED,), {}),
    ],
}
# The rows of the reduction table for experts done the other way (mutations.py), in a layout where it
# matters: statistic, criterion and kind of batch in which it must show.
WRONG = [
    ("copies_of_experts_not_merged", "moe-dp2", PLAIN, "experts", "mean,l2"),
    ("copies_of_experts_not_merged", "moe-tp2-etp1-spTrue", MASKED, "expert_ffn", "mean,l2"),
    ("roots_before_merged_over_data", "moe-dp2", MASKED, "experts", "l2,mean"),
    ("channels_added_over_tensor_parallel_ranks", "moe-tp2-spTrue", PLAIN, "expert_ffn", "l2,mean"),
    ("channels_added_over_tensor_parallel_ranks", "moe-ep2", PLAIN, "experts", "l2,mean"),
    ("tokens_sent_twice_counted_twice", "moe-tp2", PLAIN, "experts", "mean,l2"),
    ("tokens_sent_twice_counted_twice", "moe-tp2-etp1", MASKED, "expert_ffn", "mean,l2"),
    ("tokens_of_experts_in_rank_order", "moe-tp2-ep2-spTrue", MASKED, "experts", "l2,mean"),
    ("norms_of_an_experts_shards", "moe-tp2-spTrue", PACKED, "experts", "l2,mean"),
    ("masks_ignored", "moe-ep2", MASKED, "expert_ffn", "l2,mean"),
    ("finished_before_merged_over_the_sequence", "mla-tp2-spTrue", PLAIN, "kv_latent", "l2,var"),
]


def _case(world, kind, layout, batches, more):
    plain = "".join(f"-{k}{v}" for k, v in layout.items())
    name = kind + plain + ("-allgather" if "options" in more else "") + ("-grouped" if "grouped" in more else "")
    return {
        "name": name, "kind": kind, "layout": layout, "world": world, "batches": batches,
        "mutations": [(m, batch) for m, of, batch, *_ in WRONG if of == name], **more,
    }  # fmt: skip


CASES = [_case(world, *entry) for world, entries in LAYOUTS.items() for entry in entries]
WITH = [(case, kind) for case in CASES for kind in (*case["batches"], *(f"taylor-{k}" for k in case.get("taylor", ())))]
ALONE = [(case, kind) for case, kind in WITH if case["world"] == 1]
SHARED = [(case, kind) for case, kind in WITH if case["world"] > 1]
COUNTS = {PLAIN: (12, 12 * 24), MASKED: (10, 148), PACKED: (9, 22 + 24 + 24 + 20)}


def ids(pairs):
    return [f"{case['name']}-{kind}" for case, kind in pairs]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """World size -> folder of results; one torchrun for all layouts of a size, one process first."""
    folder, done = tmp_path_factory.mktemp("kinds"), {}
    lengths = [24, 5, 17, 0, 24, 1, 20, 13, 24, 9, 0, 11]
    np.save(folder / "mask.npy", (np.arange(24) < np.array(lengths)[:, None]).astype(np.float32))

    def of(world):
        if world > 1:
            of(1)
        if world not in done:
            done[world] = tmp_path_factory.mktemp(f"world{world}")
            cases = json.dumps([case for case in CASES if case["world"] == world])
            run_ranks(world, WORKER, folder, cases, done[world])
        return done[world]

    return of


def _scores(results, world, name, kind):
    return Scores.load(results(world) / f"{name}-{kind}.safetensors")


def _difference(found, expected):
    """The largest difference, relative to the largest score of its row; rows of zeros must be equal."""
    largest = np.abs(expected).max(axis=-1, keepdims=True)
    return (np.abs(found - expected) / np.where(largest, largest, 1)).max()


def _rows(name, architecture):
    """The rows of a statistic that the model has."""
    if name in ("experts", "expert_ffn", "shared_expert_ffn"):
        return list(architecture.moe_layers)
    return list(architecture.dense_layers) if name in ("ffn", "ffn_pre_activation") else slice(None)


@pytest.mark.parametrize(("case", "kind"), ALONE, ids=ids(ALONE))
def test_one_process_equals_the_book(case, kind, results):
    scores = _scores(results, 1, case["name"], kind)
    expected = np.load(results(1) / f"{case['name']}-{kind}.npz")
    names = {key.split("/")[1] for key in expected.files} & set(scores.tensors)
    without = EXTRA.get(case["kind"], []) if "taylor" in kind else []
    assert names == {*axes_of(case["kind"]), "hidden"} - {*without}
    for criterion in CRITERIA:
        under = scores.under(criterion)
        for name in names:
            rows = _rows(name, scores.architecture)
            found, wanted = under[name][rows], expected[f"{criterion}/{name}"]
            assert _difference(found, wanted) < SCORES_FLOAT64, (criterion, name)
            assert np.count_nonzero(under[name]) == np.count_nonzero(found)  # layers without it have zeros


@pytest.mark.parametrize(("case", "kind"), SHARED, ids=ids(SHARED))
def test_a_layout_equals_one_process(case, kind, results):
    """Each half of the samples too: what a token's sample is must survive the dispatch to an expert."""
    scores = _scores(results, case["world"], case["name"], kind)
    reference = _scores(results, 1, case["kind"], kind)
    assert (scores.samples, scores.tokens) == COUNTS[kind.removeprefix("taylor-")]
    assert scores.states.keys() == reference.states.keys()
    assert scores.method == reference.method == ("taylor" if "taylor" in kind else "activation")
    for criterion in CRITERIA:
        tolerance = SCORES_FLOAT64 if "var" in criterion else SCORES_FP32  # a difference of near numbers
        for half in (None, 0, 1):
            expected = criteria.finish(reference.states, criterion, half)
            for name, found in criteria.finish(scores.states, criterion, half).items():
                assert _difference(found, expected[name]) < tolerance, (criterion, half, name)


@pytest.mark.parametrize(("mutation", "name", "kind", "axis", "criterion"), WRONG)
def test_the_other_way_gives_other_scores(mutation, name, kind, axis, criterion, results):
    case = next(case for case in CASES if case["name"] == name)
    wrong = _scores(results, case["world"], name, mutation).under(criterion)
    reference = _scores(results, 1, case["kind"], kind).under(criterion)
    assert _difference(wrong[axis], reference[axis]) > 100 * SCORES_FP32


@pytest.mark.parametrize("case", [case for case in CASES if case["world"] == 1], ids=lambda case: case["name"])
def test_hooks_change_nothing_and_go(case, results):
    """Bit-equal outputs; no hook after an error, in the middle of either method; parameters as they were."""
    result = json.loads((results(1) / f"{case['kind']}.json").read_text())
    assert result["equal"]
    assert result["failed"] == {"activation": "a module failed", "taylor": "a module failed"}
    assert result["hooks"] == 0
    assert result["frozen"] == ["decoder.layers.3.self_attention.linear_proj.weight"]  # the one that was before
    assert result["gradients"] == 0


def test_architecture_of_a_mixture(results):
    given = json.loads((results(1) / "moe.json").read_text())["architecture"]
    architecture = Architecture.from_dict(given)
    assert (architecture.num_moe_experts, architecture.moe_router_topk) == (4, 2)
    assert (architecture.moe_ffn_hidden_size, architecture.moe_shared_expert_intermediate_size) == (20, 28)
    assert architecture.moe_layers == (1, 2, 3)


def test_what_cannot_be_scored_is_refused_in_one_sentence(results):
    told = {kind: json.loads((results(1) / f"{kind}.json").read_text())["refused"] for kind in ("moe", "mla")}
    assert told["mla"]["method"] == "method 'tailor' is unknown; did you mean 'taylor'?"
    assert "nothing in this model is watched for 'kv_latent'" in told["mla"]["axis"]
    assert "dropped or padded, by moe_expert_capacity_factor=1.0" in told["moe"]["moe_expert_capacity_factor"]
    assert "dropped or padded, by moe_router_padding_for_fp8=True" in told["moe"]["moe_router_padding_for_fp8"]
    assert "'flex' dispatcher are not watched; legal are allgather" in told["moe"]["moe_token_dispatcher_type"]
    assert "under vp=2 virtual pipeline stages" in json.loads((results(2) / "virtual.json").read_text())
