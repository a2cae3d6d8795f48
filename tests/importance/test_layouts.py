"""A layout never changes a result: weights, digests, scores and logits of every layout against one process."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from layouts_worker import AXES, BOUNDARIES, CRITERIA
from pico import pico_arcee, pico_llama, pico_ministral, pico_mistral, pico_seed_oss, pico_smollm3
from ranks import run_ranks
from scores64 import activations, scores64
from tolerances import LOGITS_PICO_FP32, SCORES_FLOAT64, SCORES_FP32

from nemo_minitron.artifacts import Scores
from nemo_minitron.search import compare_plans, plan

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "layouts_worker.py"
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 16}
LAYER_TYPES = [f"{kind}_attention" for kind in ("full", "sliding", "sliding", "full", "sliding", "full")]
MODELS = {  # TP must divide the query groups: 3 for TP=3, 4 for TP=2 and 4; the vocabulary of 509 divides by none
    "three": lambda folder: pico_llama(folder, num_attention_heads=6, num_key_value_heads=3),
    "four": lambda folder: pico_llama(folder, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True),
    "llama3-rope": lambda folder: pico_llama(folder, rope_scaling=LLAMA3_ROPE),
    "linear-rope": lambda folder: pico_llama(folder, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "mistral": lambda folder: pico_mistral(folder, sliding_window=8),
    "ministral": lambda folder: pico_ministral(
        folder, num_attention_heads=8, num_key_value_heads=4, sliding_window=8, layer_types=LAYER_TYPES
    ),
    "smollm3": lambda folder: pico_smollm3(folder, num_attention_heads=8, num_key_value_heads=4),
    "arcee": lambda folder: pico_arcee(folder, num_attention_heads=8, num_key_value_heads=4),
    "seed_oss": lambda folder: pico_seed_oss(folder, num_attention_heads=8, num_key_value_heads=4),
}
PLAIN, MASKED, PACKED = "plain", "masked", "packed"
ALL = (PLAIN, MASKED, PACKED)
LAYOUTS = {  # world size -> model, layout, kinds of batches; a new layout is one entry
    1: [
        ("three", {}, ALL),
        ("four", {}, ALL),
        ("mistral", {}, (PLAIN,)),
        ("llama3-rope", {}, (PLAIN,)),
        ("linear-rope", {}, (PLAIN,)),
        ("ministral", {}, ALL),
        ("smollm3", {}, (PLAIN,)),
        ("arcee", {}, (MASKED,)),
        ("seed_oss", {}, (PLAIN,)),
    ],
    2: [
        ("four", {"tp": 2}, ALL),
        ("four", {"tp": 2, "sp": True}, ALL),
        ("four", {"pp": 2}, ALL),
        ("three", {"pp": 2}, (PLAIN,)),
        ("three", {"pp": 2, "first_stage": 4}, (PLAIN,)),
        ("three", {"pp": 2, "vp": 3}, ALL),
        ("three", {"dp": 2}, ALL),
        ("four", {"cp": 2}, (PLAIN, MASKED)),
        ("ministral", {"pp": 2, "first_stage": 4}, (PLAIN,)),  # the global numbers of layers with a window
        ("ministral", {"tp": 2, "sp": True}, (MASKED, PACKED)),
        ("ministral", {"cp": 2}, (PLAIN,)),
        ("smollm3", {"pp": 2, "first_stage": 4}, (PLAIN,)),  # the global numbers of layers without rotary positions
        ("smollm3", {"tp": 2, "sp": True}, (PLAIN,)),
        ("arcee", {"tp": 2, "sp": True}, (MASKED,)),
        ("seed_oss", {"tp": 2, "sp": True}, (PLAIN,)),
    ],
    3: [
        ("three", {"tp": 3}, (PLAIN,)),
        ("three", {"tp": 3, "sp": True}, ALL),
        ("mistral", {"tp": 3, "sp": True}, (PLAIN,)),
        ("three", {"pp": 3, "first_stage": 1, "last_stage": 1}, ALL),
        ("three", {"dp": 3}, (PLAIN, MASKED)),
    ],
    4: [
        ("four", {"tp": 4, "sp": True}, (PLAIN,)),
        ("four", {"tp": 2, "pp": 2, "sp": True}, ALL),
        ("four", {"tp": 2, "dp": 2, "sp": True}, ALL),
        ("four", {"tp": 2, "cp": 2, "sp": True}, (PLAIN, MASKED)),
        ("three", {"pp": 2, "vp": 3, "dp": 2}, (MASKED,)),
        ("four", {"cp": 2, "dp": 2}, (MASKED,)),
    ],
}
# Each row of the reduction table done the other way (mutations.py), in a layout where it matters: statistic,
# criterion and kind of batch in which it must show.
WRONG = [
    ("finished_before_merged_over_the_sequence", "four-tp2-spTrue", PLAIN, "norms", "l2,mean"),
    ("finished_before_merged_over_the_sequence", "four-cp2", PLAIN, "norms", "l2,mean"),
    ("roots_before_merged_over_data", "three-dp2", PLAIN, "ffn", "l2,mean"),
    ("roots_before_merged_over_data", "three-dp2", MASKED, "layers", "l2,mean"),
    ("channels_added_over_tensor_parallel_ranks", "four-tp2", PLAIN, "ffn", "l2,mean"),
    ("channels_added_over_tensor_parallel_ranks", "four-tp2", PLAIN, "heads", "l2,mean"),
    ("replicas_counted_on_every_rank", "four-tp2", PLAIN, "norms", "l2,mean"),
    ("layers_placed_by_local_number", "three-pp2", PLAIN, "layers", "l2,mean"),
    ("layers_placed_by_local_number", "three-pp2-vp3", PLAIN, "ffn", "l2,mean"),
    ("mask_cut_in_one_piece", "four-cp2", MASKED, "ffn", "l2,mean"),
    ("masks_ignored", "three-dp2", MASKED, "ffn", "mean,mean"),
    ("boundaries_ignored", "three-dp2", PACKED, "ffn", "l2,mean"),
    ("tail_counted", "three-dp3", MASKED, "ffn", "l2,mean"),
]


def _name(model, layout):
    return model + "".join(f"-{k}{v}" for k, v in layout.items())


CASES = [
    {
        "name": _name(model, layout), "model": model, "layout": layout, "world": world, "kinds": kinds,
        "mutations": [(m, kind) for m, name, kind, *_ in WRONG if name == _name(model, layout)],
    }
    for world, layouts in LAYOUTS.items()
    for model, layout, kinds in layouts
]  # fmt: skip
KINDS = [(case, kind) for case in CASES for kind in case["kinds"]]
COUNTS = {PLAIN: (16, 16 * 24), MASKED: (14, 214), PACKED: (9, 22 + 24 + 24 + 20)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        make(folder / name)
    generator = np.random.default_rng(3)
    np.save(folder / "tokens.npy", generator.integers(0, 509, (16, 24)))
    lengths = [24, 5, 17, 0, 24, 1, 20, 13, 24, 9, 0, 24, 11, 19, 7, 16]
    np.save(folder / "mask.npy", (np.arange(24) < np.array(lengths)[:, None]).astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    """World size -> folder of results; one torchrun for all layouts of a size."""
    done = {}

    def of(world):
        if world not in done:
            out = tmp_path_factory.mktemp(f"world{world}")
            cases = json.dumps([case for case in CASES if case["world"] == world])
            run_ranks(world, WORKER, models, cases, out)
            done[world] = out
        return done[world]

    return of


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_weights_and_digest(case, results):
    result = json.loads((results(case["world"]) / f"{case['name']}.json").read_text())
    assert result["differing"] == []
    assert result["digest"]
    assert result["magnitude"]  # scores of weights, read from the live model and from the folder


def _scores(results, world, name, kind):
    return Scores.load(results(world) / f"{name}-{kind}.safetensors")


def _difference(found, expected):
    """The largest difference, relative to the largest score of its row."""
    largest = np.abs(expected).max(axis=-1, keepdims=True)
    return (np.abs(found - expected) / largest).max()


@pytest.mark.parametrize(("case", "kind"), KINDS, ids=[f"{case['name']}-{kind}" for case, kind in KINDS])
def test_scores_equal_one_process(case, kind, results):
    scores = _scores(results, case["world"], case["name"], kind)
    reference = _scores(results, 1, case["model"], kind)
    assert (scores.samples, scores.tokens) == COUNTS[kind]
    assert set(scores.tensors) == {*AXES, "query_groups", "hidden", "stream"}
    assert set(scores.criteria) == set(CRITERIA)
    for criterion in CRITERIA:
        found, expected = scores.under(criterion), reference.under(criterion)
        for name in expected.tensors:
            assert _difference(found[name], expected[name]) < SCORES_FP32, (criterion, name)


def _by_the_book(folder, kind):
    """The samples that a kind of batches holds, each as a list of tokens; padding never is one."""
    tokens = np.load(folder / "tokens.npy")
    if kind == PLAIN:
        return list(tokens)
    if kind == MASKED:
        return [
            row[: int(mask.sum())] for row, mask in zip(tokens, np.load(folder / "mask.npy"), strict=True) if mask.any()
        ]
    return [tokens[k, a:b] for k, bounds in enumerate(BOUNDARIES) for a, b in itertools.pairwise(bounds)]


IN_FLOAT64 = [
    *itertools.product(["three", "four", "ministral"], ALL),
    ("smollm3", PLAIN),
    ("arcee", MASKED),
    ("seed_oss", PLAIN),
]


@pytest.mark.parametrize(("model", "kind"), IN_FLOAT64)
def test_scores_equal_transformers_in_float64(model, kind, results, models):
    scores = _scores(results, 1, model, kind)
    found = activations(models / model, _by_the_book(models, kind))
    for criterion in CRITERIA:
        for name, expected in scores64(found, criterion).items():
            assert _difference(scores.under(criterion)[name], expected) < SCORES_FLOAT64, (criterion, name)


@pytest.mark.parametrize(("case", "kind"), KINDS, ids=[f"{case['name']}-{kind}" for case, kind in KINDS])
def test_kept_indices_equal_one_process(case, kind, results):
    """The same plan but for channels within the tolerance of the threshold."""
    scores = _scores(results, case["world"], case["name"], kind)
    reference = _scores(results, 1, case["model"], kind)
    keep = {"ffn": 50, "hidden": 30, "layers": 4}
    made, expected = plan(scores, keep=keep), plan(reference, keep=keep)
    assert compare_plans(made, expected, reference, 2 * SCORES_FP32).outside == 0


@pytest.mark.parametrize(("mutation", "name", "kind", "axis", "criterion"), WRONG)
def test_the_other_way_gives_other_scores(mutation, name, kind, axis, criterion, results):
    """The table's rows are not conventions: each one, broken, moves scores far beyond the tolerance."""
    case = next(case for case in CASES if case["name"] == name)
    wrong = _scores(results, case["world"], name, mutation).under(criterion)
    reference = _scores(results, 1, case["model"], kind).under(criterion)
    assert _difference(wrong[axis], reference[axis]) > 100 * SCORES_FP32


@pytest.mark.parametrize(
    "case", [c for c in CASES if not {"pp", "cp"} & set(c["layout"])], ids=lambda case: case["name"]
)
def test_logits_equal_transformers(case, results, models):
    import torch
    from transformers import AutoModelForCausalLM

    tokens = torch.from_numpy(np.load(models / "tokens.npy"))[:2]
    model = AutoModelForCausalLM.from_pretrained(models / case["model"], torch_dtype=torch.float32)
    expected = model(tokens).logits.detach().numpy()
    logits = np.load(results(case["world"]) / f"{case['name']}.npy")
    assert np.abs(logits - expected).max() < LOGITS_PICO_FP32
    assert (logits.argmax(-1) == expected.argmax(-1)).all()
