"""Settings of a training besides its layout: it stops and resumes, it validates, it learns from something else."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from pico import pico_llama
from ranks import run_ranks
from tolerances import LOSS_BF16_TEACHER, LOSS_LAYOUT_FP32
from words import save_tokenizer

from nemo_minitron.data import build, load_tokenizer
from nemo_minitron.families import from_hf
from nemo_minitron.pruning import prune
from nemo_minitron.search import random_plan

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "distill_worker.py"
TEXTS = [f"the model number {i} reads {i * 7} words and the next {'word ' * (i % 9)}ends." for i in range(300)]
STEP = 24 * 4
BASE = {
    "tokens": STEP * 6, "sequence_length": 24, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3,
    "min_learning_rate": 1e-4, "warmup_tokens": STEP * 2, "precision": "fp32", "save_every": 3,
}  # fmt: skip
ALL = BASE | {"tokens": STEP * 9, "lm_weight": 0.5, "intermediate": "auto"}
ALL |= {"validate_every": 2, "validation_batches": 2}
RECIPES = {  # name -> settings, steps after which it stops for now
    "straight": (ALL, (6,)),  # not to its end, where NeMo saves no optimizer
    "halted": (ALL, (3, 6)),
    "plain": (BASE, ()),
    "offloaded": (BASE | {"offload_teacher": True}, ()),
    "reverse": (BASE | {"loss": "reverse_kl", "temperature": 2.0}, ()),
    "top": (BASE | {"loss": "top_k_kl", "top_k": 600}, ()),
    "lm": (BASE | {"logits_weight": 0.0, "lm_weight": 1.0}, ()),
    "mixed": (BASE | {"teacher_precision": "bf16"}, ()),
    "random": (BASE | {"start": "random"}, ()),
    "early": (BASE | {"learning_rate": 1e-30, "min_learning_rate": 0.0, "validate_every": 1, "patience": 2}, ()),
}
CASES = [
    {"name": name, "teacher": "teacher", "student": "student", "layout": {}, "recipe": recipe, "stops": stops,
     "plan": "plan.json"}
    for name, (recipe, stops) in RECIPES.items()
]  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("trained")
    pico_llama(folder / "teacher")
    save_tokenizer(folder / "teacher", TEXTS, 509)
    plan = random_plan(from_hf(folder / "teacher"), keep={"ffn": 64, "layers": 4, "hidden": 40})
    plan.save(folder / "plan.json")
    prune(folder / "teacher", plan, folder / "student")
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    build(folder / "corpus.jsonl", load_tokenizer(folder / "teacher"), folder / "corpus")
    run_ranks(1, WORKER, folder, json.dumps(CASES), out, "straight")
    return out


def rows(file, name):
    return [row[name] for row in csv.DictReader(file.open())]


def losses(folder, name="loss"):
    return np.array([float(value) for value in rows(folder / "loss.csv", name)])


def state(folder):
    """Every tensor of the last checkpoint: weights, fp32 masters, both moments, scheduler and data position."""
    import torch
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    from nemo_minitron.sources.checkpoint import last_checkpoint

    weights = last_checkpoint(folder) / "weights"
    common = torch.load(weights / "common.pt", weights_only=False)
    return _load_state_dict_from_keys(checkpoint_id=str(weights)), common


def leaves(value, path=""):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{path}.{i}")
    else:
        yield path, value


def test_three_steps_and_three_more_are_six_bit_by_bit(out):
    """This holds for losses with all their parts, weights, masters, moments, the scheduler, the projection and its
    moments, and alpha."""
    import torch

    straight, halted = (list(csv.DictReader((out / run / "loss.csv").open())) for run in ("straight", "halted"))
    assert [row | {"seconds": ""} for row in halted] == [row | {"seconds": ""} for row in straight]
    straight, halted = (list(csv.DictReader((out / run / "validation.csv").open())) for run in ("straight", "halted"))
    assert [row for row in halted if row["step"] != "3"] == straight  # where it stopped it was validated too
    straight, halted = (dict(leaves(state(out / run))) for run in ("straight", "halted"))
    assert straight.keys() == halted.keys()
    kinds = [p for p, value in straight.items() if isinstance(value, torch.Tensor) and ".callbacks." not in p]
    for wanted in ("exp_avg_sq", "minitron_distillation.projection.weight", "minitron_distillation.projection.adam"):
        assert any(wanted in path for path in kinds), wanted
    assert [path for path in kinds if not torch.equal(straight[path], halted[path])] == []
    plain = [path for path in straight if path.endswith((".alpha", "consumed_samples", "lr", "global_step"))]
    assert len(plain) > 3
    assert [path for path in plain if straight[path] != halted[path]] == []


def test_validation_is_the_lm_loss_on_held_out_text(out):
    """It falls during training. Before the first step it is the loss of `early`, whose learning rate is 0."""
    assert rows(out / "straight" / "validation.csv", "step") == ["2", "4", "6"]
    trained = [float(v) for v in rows(out / "straight" / "validation.csv", "loss")]
    still = [float(v) for v in rows(out / "early" / "validation.csv", "loss")]
    assert trained[0] > trained[1] > trained[2]
    assert len(set(still)) == 1
    assert trained[2] < still[0]


def test_early_stopping_ends_it(out):
    assert rows(out / "early" / "loss.csv", "step") == ["1", "2", "3"]  # the first is the best; two are not better
    assert json.loads((out / "early" / "last.json").read_text())["stopped"] == 3


def test_an_offloaded_teacher_gives_the_same_losses(out):
    np.testing.assert_array_equal(losses(out / "offloaded"), losses(out / "plain"))


def test_the_teachers_precision_is_its_own(out):
    """A teacher in bf16 changes the losses by its rounding: the difference exists and is small."""
    difference = np.abs(losses(out / "mixed") / losses(out / "plain") - 1)
    assert 0 < difference.max() < LOSS_BF16_TEACHER


def test_modes_give_losses_of_their_own(out):
    plain = losses(out / "plain")
    np.testing.assert_allclose(losses(out / "straight", "logits")[0], plain[0], rtol=LOSS_LAYOUT_FP32)
    np.testing.assert_allclose(losses(out / "straight", "lm")[0], losses(out / "lm")[0], rtol=LOSS_LAYOUT_FP32)
    np.testing.assert_allclose(losses(out / "top"), plain, rtol=LOSS_LAYOUT_FP32)  # k is the whole vocabulary
    assert abs(losses(out / "reverse")[0] / plain[0] - 1) > 10 * LOSS_LAYOUT_FP32
    assert losses(out / "random")[0] != plain[0]
    assert abs(losses(out / "lm")[0] - np.log(509)) < 1  # the pico models are random


def test_a_users_own_script_needs_the_callback_alone(out):
    """It goes on from a checkpoint that NeMo alone restores; the parts of the loss are among NeMo's own metrics."""
    result = json.loads((out / "script.json").read_text())
    first, second = result["logged"]
    for metrics in (first, second):
        parts = metrics["distillation/logits"] + metrics["distillation/lm"]
        assert metrics["reduced_train_loss"] == pytest.approx(parts, rel=LOSS_LAYOUT_FP32)
    start, end = (losses(out / "straight", "logits")[i] for i in (0, -1))
    assert abs(first["distillation/logits"] - end) < abs(first["distillation/logits"] - start)
    assert "average_in_collective" in result["refused"]
