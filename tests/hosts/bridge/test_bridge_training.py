"""Distillation in Bridge's own training loop, in every layout: the losses of one process, step by step.

Samples have masks of unlike lengths (bridge_worker.py), teacher and student have another depth, and each step has
eight micro-batches. Mutations tried by hand, each of which makes tests here fail: the replayed micro-batches of a
staged teacher in reverse; `calculate_per_token_loss` off (DP=2); the loss on an earlier stage not broadcast;
`backend.optimizer.save_whole` left out ("moved").
"""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from pico import pico_llama, pico_nemotron_h, pico_qwen3_moe, wider
from ranks import run_ranks
from tolerances import LOSS_LAYOUT_FP32
from words import save_tokenizer

from nemo_minitron.data import build, load_tokenizer
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.hosts.bridge.host import BRIDGE
from nemo_minitron.pruning import HFSource, prune
from nemo_minitron.pruning.convert import convert
from nemo_minitron.search import random_plan
from nemo_minitron.sources.bridge_config import TRACKER, hf_config
from nemo_minitron.sources.checkpoint import CheckpointSource, last_checkpoint
from nemo_minitron.sources.open import open_source
from nemo_minitron.sources.tensors import whole

pytestmark = [pytest.mark.slow, pytest.mark.bridge]
WORKER = Path(__file__).parent / "bridge_worker.py"
EXAMPLES = Path(__file__).parents[3] / "examples"
TEXTS = [f"the model number {i} reads {i * 7} words and the next {'word ' * (i % 9)}ends." for i in range(300)]
MODELS = {  # name -> its maker, what of it a student keeps
    "llama": (
        lambda f: pico_llama(
            f, vocab_size=509, hidden_size=48, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=6,
            tie_word_embeddings=True,
        ),
        {"ffn": 64, "layers": 4, "hidden": 40},
    ),
    "moe": (
        lambda f: pico_qwen3_moe(f, vocab_size=509, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4),
        {"hidden": 40},
    ),
    "hybrid": (  # M-M*-M -> M-*M
        lambda f: pico_nemotron_h(f, vocab_size=509, num_attention_heads=8, num_key_value_heads=4),
        {"layers": [0, 1, 3, 5], "hidden": 40, "ffn": 64, "mamba_heads": 6},
    ),
}  # fmt: skip
BASE = {
    "tokens": 24 * 8 * 4, "sequence_length": 24, "global_batch_size": 8, "micro_batch_size": 1, "learning_rate": 1e-3,
    "warmup_steps": 1, "precision": "fp32", "validate_every": 2, "validation_batches": 2,
}  # fmt: skip
RECIPES = {
    "kl": BASE,
    "all": BASE | {"lm_weight": 0.3, "intermediate": "embedding,attention:1:2,mlp:3:5,block:0:1,block:2:4"},
    "states": BASE | {"lm_weight": 0.3, "intermediate": "embedding,block:0:0,mlp:1:4,block:2:4,block:3:5"},
    "aux": BASE | {"moe_aux_loss_coeff": 0.3},
}
LAYOUTS = {  # world size -> model, recipe, layout
    1: [("llama", "kl", {}), ("llama", "all", {}), ("moe", "aux", {}), ("hybrid", "states", {})],
    2: [
        ("llama", "kl", {"pp": 2}),
        ("llama", "all", {"pp": 2, "vp": 2}),
        ("llama", "all", {"dp": 2}),
        ("llama", "kl", {"cp": 2}),
        ("llama", "all", {"tp": 2, "sp": True}),
        *[("hybrid", "states", layout) for layout in ({"pp": 2}, {"dp": 2}, {"tp": 2, "sp": True}, {"cp": 2})],
        *[("moe", "aux", layout) for layout in ({"ep": 2, "dp": 2}, {"tp": 2, "sp": True}, {"cp": 2})],
    ],
}


def _case(world, model, recipe, layout, /, **others):
    name = f"{model}-{recipe}" + "".join(f"-{k}{v}" for k, v in layout.items())
    return {
        "name": name, "teacher": model, "student": f"{model}-student", "layouts": [layout], "recipe": RECIPES[recipe],
        "one": f"{model}-{recipe}", "world": world, "plan": f"{model}-plan.json", **others,
    }  # fmt: skip


CASES = [_case(world, *case) for world, cases in LAYOUTS.items() for case in cases]
CASES += [_case(2, "llama", "kl", {"tp": 2}, name="wider", teacher="llama-wider", common=509)]  # eleven rows more
RESUMED = [
    _case(1, "llama", "all", {}, name="resumed", stops=[2, None], layouts=[{}, {}]),
    _case(2, "llama", "all", {}, name="moved", stops=[2, None], layouts=[{"pp": 2}, {"tp": 2, "sp": True}]),
    _case(2, "hybrid", "states", {}, name="hybrid-moved", stops=[2, None], layouts=[{"tp": 2, "sp": True}, {"pp": 2}]),
]
DIVERGING = [
    _case(1, "llama", "kl", {}, name="weights", diverges="weights", recipe=BASE | {"save_every": 1}),
    _case(2, "llama", "kl", {}, name="loss", diverges="loss", layouts=[{"pp": 2}], recipe=BASE | {"save_every": 1}),
]
ENDING = [
    _case(1, "llama", "kl", {}, name="early", recipe=BASE | {"learning_rate": 1e-30, "min_learning_rate": 0.0}
          | {"tokens": 24 * 8 * 9, "validate_every": 1, "patience": 2}),
    _case(1, "llama", "kl", {}, name="random", recipe=BASE | {"start": "random"}),
    _case(1, "llama", "all", {}, name="lost", stops=[2, None], layouts=[{}, {}], loses="distillation_0000002.pt"),
]  # fmt: skip
ALL = [*CASES, *RESUMED, *ENDING, *DIVERGING]
SPREAD = [case for case in [*CASES, *RESUMED] if case["name"] != case["one"]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, (make, keep) in MODELS.items():
        make(folder / name)
        save_tokenizer(folder / name, TEXTS, 509)
        plan = random_plan(from_hf(folder / name), keep=keep)
        plan.save(folder / f"{name}-plan.json")
        prune(folder / name, plan, folder / f"{name}-student")
    wider(folder / "llama", folder / "llama-wider", 520)
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    build(folder / "corpus.jsonl", load_tokenizer(folder / "llama"), folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    """Case -> its folder. One worker runs all layouts of a world size."""
    done = {}

    def of(case):
        world = case["world"]
        if world not in done:
            done[world] = tmp_path_factory.mktemp(f"world{world}")
            run_ranks(world, WORKER, models, json.dumps([c for c in ALL if c["world"] == world]), done[world])
        return done[world] / case["name"]

    return of


def columns(folder, name="loss.csv"):
    rows = list(csv.DictReader((folder / name).open()))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("case", SPREAD, ids=lambda case: case["name"])
def test_losses_equal_one_process(case, results):
    """Each part of the loss is compared too, and the held-out loss."""
    one = next(other for other in CASES if other["name"] == case["one"])
    for name in ("loss.csv", "validation.csv"):
        found, expected = columns(results(case), name), columns(results(one), name)
        assert found.keys() == expected.keys()
        assert len(found["loss"]) == (4 if name == "loss.csv" else 2)
        for column in found.keys() - {"seconds"}:
            np.testing.assert_allclose(found[column], expected[column], rtol=LOSS_LAYOUT_FP32, err_msg=column)


def test_the_losses_are_those_that_were_asked_for(results):
    found = columns(results(CASES[1]))
    parts = ["logits", "lm", "embedding", "attention:1:2", "mlp:3:5", "block:0:1", "block:2:4"]
    assert list(found) == ["step", "tokens", "loss", "seconds", *parts, "alpha"]
    np.testing.assert_allclose(found["loss"], found["logits"] + 0.3 * found["lm"], rtol=1e-4)
    assert "moe_aux_loss" in columns(results(CASES[2]))


@pytest.mark.parametrize("case", [*CASES, *RESUMED], ids=lambda case: case["name"])
def test_a_checkpoint_is_bridges_and_the_students_alone(case, results, models):
    """It names no class of this package and no path of the teacher, and holds all of the student's tensors."""
    folder = last_checkpoint(results(case))
    assert folder.name == "iter_0000004"
    source = CheckpointSource(folder)
    assert source.architecture == from_hf(models / case["student"])
    text = (folder / "run_config.yaml").read_text()
    assert "nemo_minitron" not in text
    assert str(models / case["teacher"]) not in text.replace(str(models / case["student"]), "")
    assert b"nemo_minitron" not in (folder / ".metadata").read_bytes()
    assert [path.name for path in folder.parent.glob("iter_*") if path.is_dir()] == [folder.name]


def test_a_held_out_loss_that_does_not_fall_ends_the_training(results):
    """The learning rate is next to nothing: two validations after the first one do not improve on it."""
    found = columns(results(ENDING[0]), "validation.csv")
    assert list(found["step"]) == [1, 2, 3]
    assert len(set(found["loss"])) == 1
    record = json.loads((results(ENDING[0]) / "last.json").read_text())
    assert record == {"checkpoint": "bridge/checkpoints/iter_0000003", "stopped": 3}


def test_a_random_start_is_another_student(results):
    """Its first loss is far from the filled student's, and the same in every run."""
    random, filled = (columns(results(case))["loss"][0] for case in (ENDING[1], CASES[0]))
    assert abs(random / filled - 1) > 100 * LOSS_LAYOUT_FP32


def test_a_resume_without_the_state_of_the_loss_is_refused(results):
    said = json.loads((results(ENDING[2]) / "refused.json").read_text())
    assert said.startswith("the checkpoint from which this training resumes has nothing of the loss between states")


@pytest.mark.parametrize("case", DIVERGING, ids=lambda case: case["name"])
def test_a_training_that_diverges_stops_at_that_step_on_all_ranks(case, results):
    folder = results(case)
    number = {"weights": "the weights' extreme is infinite", "loss": "the loss is NaN"}[case["diverges"]]
    for rank in range(case["world"]):
        said = json.loads((folder / f"said-{rank}.json").read_text())
        assert said.startswith("training stopped at step 3: ")
        assert number in said
        assert said.endswith("bridge/checkpoints/iter_0000002")
    assert np.isfinite(columns(folder)["loss"]).all()
    assert [path.name for path in (folder / "bridge" / "checkpoints").glob("iter_*")] == ["iter_0000002"]


def test_a_damaged_checkpoint_is_removed_and_the_one_before_it_is_taken(results, tmp_path):
    """As after a kill while a checkpoint is saved: Bridge would resume from the one that its tracker names."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(last_checkpoint(results(CASES[0])).parent, folder)
    shutil.copytree(folder / "iter_0000004", folder / "iter_0000009")
    (file,) = (folder / "iter_0000009").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-5000])
    (folder / TRACKER).write_text("9")
    kept, lines = BRIDGE.keep_whole(folder)
    assert kept == {4: folder / "iter_0000004"}
    assert [line for line in lines if "iter_0000009 is damaged" in line] == lines
    assert ((folder / TRACKER).read_text(), (folder / "iter_0000009").exists()) == ("4", False)
    (folder / "iter_0000004" / "train_state.pt").write_bytes(b"cut")
    assert BRIDGE.keep_whole(folder)[0] == {}
    assert not (folder / TRACKER).exists()


def test_a_checkpoint_is_a_model_like_any_other(results, models, tmp_path):
    """Its folder or the one above it; as a Hugging Face folder it has the bits that the training wrote."""
    checkpoint = last_checkpoint(results(CASES[0]))
    opened = open_source(checkpoint.parent)
    assert opened.path == checkpoint
    folder = convert(checkpoint.parent, tmp_path / "folder")
    written = HFSource(folder)
    assert written.architecture == from_hf(models / "llama-student")
    for name, shape in written.architecture.shapes().items():
        assert np.array_equal(written.read(name, whole(shape)), opened.read(name, whole(shape))), name


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("use_mup", True, "no supported family has a model with these fields of Megatron"),
        ("qk_l2_norm", True, "the checkpoint's qk_l2_norm is True; only False is supported"),
        ("multi_latent_attention", True, "only False is supported"),
        ("hybrid_layer_pattern", "M-*", "the checkpoint's is_hybrid_model is False; only True is supported"),
        ("_target_", "other.Provider", "is a other.Provider with the layers of"),
        ("normalization", "LayerNorm", "no supported family has a model with these fields of Megatron"),
        ("num_layers", None, "has no model of Bridge's|no supported family"),
    ],
)
def test_a_model_that_no_family_is_is_refused_by_name(field, value, message, results, tmp_path):
    checkpoint = last_checkpoint(results(CASES[0]))
    config = yaml.safe_load((checkpoint / "run_config.yaml").read_text())
    config["model"][field] = value
    (tmp_path / "run_config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=message):
        hf_config(tmp_path)


@pytest.mark.parametrize("text", ["", "model: 3", "{", "model: {a: " + "[" * 3000])
def test_a_damaged_config_is_refused(text, tmp_path):
    (tmp_path / "run_config.yaml").write_text(text)
    with pytest.raises(InputError, match="is no config of Megatron-Bridge"):
        hf_config(tmp_path)
