"""Distillation through NeMo's trainer in every layout: the losses of one process, step by step, from one start.

Samples have masks of unlike lengths (distill_worker.py), teacher and student have another depth, and each step has
eight micro-batches. Mutations tried by hand, each of which makes tests here fail: the teacher's hidden states taken
in the reverse order; `calculate_per_token_loss` off (DP=2); the intermediate states' mask not cut for sequence or
context parallelism; the loss on an earlier stage not attached; a virtual stage with a config of its own; the
projection's gradient not summed over the pipeline, or under sequence parallelism over the tensor-parallel ranks; the
rows that only one vocabulary has compared, too.
"""

import csv
import functools
import json
from pathlib import Path

import numpy as np
import pytest
from mixture64 import farthest, first_step
from pico import pico_llama, pico_mixtral, pico_qwen3_moe, wider
from ranks import run_ranks
from tolerances import FIRST_GRADIENT_FP32, LOSS_LAYOUT_FP32
from words import save_tokenizer

from nemo_minitron.data import build, load_tokenizer
from nemo_minitron.families import from_hf
from nemo_minitron.pruning import prune
from nemo_minitron.search import random_plan

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "distill_worker.py"
TEXTS = [f"the model number {i} reads {i * 7} words and the next {'word ' * (i % 9)}ends." for i in range(300)]
MODELS = {  # name -> its maker, what of it a student keeps
    "three": (lambda f: pico_llama(f, vocab_size=509), {"ffn": 64, "layers": 4, "hidden": 40}),
    "four": (
        lambda f: pico_llama(f, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True),
        {"ffn": 64, "layers": 5, "hidden": 40},
    ),
    "moe": (
        lambda f: pico_mixtral(
            f, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, router_aux_loss_coef=0.5
        ),
        {"hidden": 40},
    ),
    "qwen": (
        lambda f: pico_qwen3_moe(
            f,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            norm_topk_prob=False,
            mlp_only_layers=[1],
        ),
        {"hidden": 40, "experts": 2},
    ),
}
BASE = {
    "tokens": 24 * 8 * 4, "sequence_length": 24, "global_batch_size": 8, "micro_batch_size": 1, "learning_rate": 1e-3,
    "warmup_steps": 1, "precision": "fp32",
}  # fmt: skip
RECIPES = {
    "kl": BASE,
    "all": BASE | {"lm_weight": 0.3, "intermediate": "embedding,attention:1:2,mlp:3:5,block:0:1,block:2:4"},
}
MIXTURES = [
    {"ep": 2, "dp": 2}, {"tp": 2, "sp": True}, {"tp": 2, "sp": True, "etp": 1}, {"dp": 2}, {"pp": 2}, {"cp": 2},
    {"tp": 2, "sp": True, "etp": 1, "ep": 2},
]  # fmt: skip
RECIPES |= {"aux": BASE | {"moe_aux_loss_coeff": 0.3}, "top": BASE | {"loss": "top_k_kl", "top_k": 20}}
LAYOUTS = {  # world size -> model, recipe, layout; a new layout is one entry
    1: [
        ("three", "kl", {}),
        ("three", "all", {}),
        ("four", "kl", {}),
        ("four", "all", {}),
        *[("moe", recipe, {}) for recipe in ("kl", "aux", "top")],
        ("qwen", "kl", {}),
    ],
    2: [
        ("qwen", "kl", {"ep": 2, "dp": 2}),
        ("qwen", "kl", {"pp": 2}),
        ("three", "kl", {"pp": 2}),
        ("four", "all", {"pp": 2}),
        ("three", "all", {"pp": 2, "vp": 2}),
        ("three", "all", {"dp": 2}),
        ("three", "all", {"cp": 2}),
        ("four", "kl", {"tp": 2}),
        ("four", "all", {"tp": 2}),
        ("four", "all", {"tp": 2, "sp": True}),
        *[("moe", "aux", layout) for layout in MIXTURES],
        ("moe", "kl", MIXTURES[-1]),
        ("moe", "top", {"tp": 2, "sp": True}),
    ],
    4: [("four", "all", {"tp": 2, "pp": 2, "sp": True})],
}


def _name(model, recipe, layout):
    return f"{model}-{recipe}" + "".join(f"-{k}{v}" for k, v in layout.items())


CASES = [
    {
        "name": _name(model, recipe, layout), "teacher": model, "student": f"{model}-student", "layout": layout,
        "recipe": RECIPES[recipe], "one": f"{model}-{recipe}", "world": world, "plan": f"{model}-plan.json",
        "gradients": model == "moe",
    }
    for world, layouts in LAYOUTS.items()
    for model, recipe, layout in layouts
]  # fmt: skip
CASES += [  # one of the two has eleven rows more: the losses are those of the first 509
    next(case for case in CASES if case["name"] == name) | {"name": f"{name}-{whose}", whose: longer, "common": 509}
    for name, whose, longer in (
        ("four-all-tp2-spTrue", "teacher", "four-wider"), ("four-kl-tp2", "student", "four-student-wider")
    )
]  # fmt: skip
DIVERGING = {  # world size -> its last case, in which a number of step 3 is none, on the last rank alone
    world: {
        "name": f"diverges-{what}", "teacher": "four", "student": "four-student", "plan": "four-plan.json",
        "recipe": BASE | {"save_every": 1}, "layout": layout, "diverges": what,
    }
    for world, what, layout in ((1, "weights", {}), (2, "loss", {"pp": 2}), (4, "gradient", {"tp": 2, "dp": 2}))
}  # fmt: skip
SPREAD = [case for case in CASES if case["world"] > 1]
each_layout = pytest.mark.parametrize("case", SPREAD, ids=lambda case: case["name"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, (make, keep) in MODELS.items():
        make(folder / name)
        save_tokenizer(folder / name, TEXTS, 509)
        plan = random_plan(from_hf(folder / name), keep=keep)
        plan.save(folder / f"{name}-plan.json")
        prune(folder / name, plan, folder / f"{name}-student")
    for name in ("four", "four-student"):
        wider(folder / name, folder / f"{name}-wider", 520)
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    build(folder / "corpus.jsonl", load_tokenizer(folder / "three"), folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    """Case -> its folder. One worker runs all layouts of a world size."""
    done = {}

    def of(case):
        world = case["world"]
        if world not in done:
            done[world] = tmp_path_factory.mktemp(f"world{world}")
            cases = [*(case for case in CASES if case["world"] == world), DIVERGING[world]]
            run_ranks(world, WORKER, models, json.dumps(cases), done[world])
        return done[world] / case["name"]

    return of


@pytest.fixture(scope="module")
def one(results):
    """Case -> the folder of the same training in one process."""
    return lambda case: results(next(c for c in CASES if c["world"] == 1 and c["name"] == case["one"]))


FUSED = [c for c in CASES if not {"lm_weight", "loss"} & c["recipe"].keys()]


@pytest.mark.parametrize("case", FUSED, ids=lambda c: c["name"])
def test_the_heads_gradient_goes_into_main_grad_but_for_one_process(case, results):
    """`test_losses_equal_one_process` then compares the two ways, for tied heads and others, under TP, PP and DP."""
    assert json.loads((results(case) / "main_grad.json").read_text()) == [case["world"] > 1]


def columns(folder):
    rows = list(csv.DictReader((folder / "loss.csv").open()))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


@each_layout
def test_losses_equal_one_process(case, results, one):
    """Each part of the loss is compared too, and alpha, which scales the gradients of the next step."""
    found, expected = columns(results(case)), columns(one(case))
    assert found.keys() == expected.keys()
    assert len(found["loss"]) == 4
    for name in found.keys() - {"seconds"}:
        np.testing.assert_allclose(found[name], expected[name], rtol=LOSS_LAYOUT_FP32, err_msg=name)


@pytest.fixture(scope="module")
def by_the_book(models, results):
    """Recipe -> gradients and routers' loss of the first step, in float64, on the rows that one process saw."""

    @functools.cache
    def of(recipe):
        one = next(case for case in CASES if case["world"] == 1 and case["name"] == f"moe-{recipe}")
        rows, given = dict(np.load(results(one) / "batches.npz")), one["recipe"]
        return first_step(
            models / "moe-student", models / "moe", rows, given.get("top_k"), given.get("moe_aux_loss_coeff", 0.0)
        )

    return of


@pytest.mark.parametrize("case", [case for case in CASES if case["gradients"]], ids=lambda case: case["name"])
def test_a_mixtures_first_gradients_are_those_of_the_loss_that_was_asked_for(case, results, by_the_book):
    """The routers' gradients too: with the model's own router_aux_loss_coef, 0.5 here, they would be far off."""
    gradients, balance = by_the_book(case["one"].removeprefix("moe-"))
    found = dict(np.load(results(case) / "gradients.npz"))
    worst = farthest(found, gradients)
    assert worst[0][0] < FIRST_GRADIENT_FP32, worst[:5]
    assert sum("router" in name for name in found) == 4
    logged = columns(results(case))
    assert ("moe_aux_loss" in logged) == ("moe_aux_loss_coeff" in case["recipe"])
    if "moe_aux_loss" in logged:
        assert logged["moe_aux_loss"][0] == pytest.approx(balance, rel=FIRST_GRADIENT_FP32)


@pytest.mark.parametrize("case", [case for case in CASES if case["gradients"]], ids=lambda case: case["name"])
def test_a_mixtures_checkpoint_keeps_its_own_coefficient(case, results):
    from nemo_minitron.sources.checkpoint import CheckpointSource, last_checkpoint

    assert CheckpointSource(last_checkpoint(results(case))).config["router_aux_loss_coef"] == 0.5


@pytest.mark.parametrize("case", [case for case in CASES if "lm_weight" in case["recipe"]], ids=lambda c: c["name"])
def test_parts_make_up_the_loss(case, results):
    found = columns(results(case))
    parts = ["logits", "lm", "embedding", "attention:1:2", "mlp:3:5", "block:0:1", "block:2:4"]
    assert list(found) == ["step", "tokens", "loss", "seconds", *parts, "alpha"]
    np.testing.assert_allclose(found["loss"], found["logits"] + 0.3 * found["lm"], rtol=1e-4)
    alpha = found["logits"] / sum(found[name] for name in parts[2:])
    np.testing.assert_allclose(found["alpha"], [1.0, *alpha[:-1]], rtol=1e-4)  # of the step before
    assert all((values[0] != values).any() for name, values in found.items() if name in parts)


@pytest.mark.parametrize("world", DIVERGING)
def test_a_training_that_diverges_stops_at_that_step_on_all_ranks(world, results):
    """The weights of step 3 are not saved, those of step 2 stay, and loss.csv holds only finite numbers."""
    case = DIVERGING[world]
    folder = results({"world": world, "name": case["name"]})
    said = [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(world)]
    number = {"weights": "the weights' extreme is infinite", "loss": "the loss is NaN"}
    number["gradient"] = "the gradients' norm is NaN"
    for sentence in said:
        assert sentence.startswith("training stopped at step 3: ")
        assert number[case["diverges"]] in sentence
        assert "at learning rate 0.000" in sentence
        assert "a learning rate that is too high" in sentence
        assert "the last good checkpoint stays: " in sentence
        assert "step=1" in sentence  # NeMo counts from 0
    logged = columns(folder)
    assert list(logged["step"]) == [1, 2, 3][: 3 if case["diverges"] == "weights" else 2]
    assert np.isfinite(logged["loss"]).all()
    saved = {path.name for path in (folder / "nemo" / "checkpoints").iterdir()}
    whole = [name for name in saved if name.endswith("-last") and f"{name}-unfinished" not in saved]
    assert len(whole) == 1
    assert whole[0].startswith("step=1")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_a_checkpoint_is_the_students_alone(case, results, models):
    """It is a plain checkpoint of NeMo's class without the teacher or this package. It has all of the student's tensors
    and no others."""
    from nemo_minitron.sources.checkpoint import CheckpointSource, last_checkpoint
    from nemo_minitron.sources.tensors import whole

    folder = last_checkpoint(results(case))
    source = CheckpointSource(folder)
    assert source.architecture == from_hf(models / case["student"])
    for name, shape in source.architecture.shapes().items():
        assert source.read(name, whole(shape)).shape == shape
    assert "nemo_minitron" not in (folder / "context" / "io.json").read_text()
