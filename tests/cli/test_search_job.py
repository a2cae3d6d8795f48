"""A recipe with a budget, from candidates to the report; what was done is not done again."""

import csv
import json

import numpy as np
import pytest
from command_line import TEXTS, losses, minitron
from pico import pico_llama, raw_tensors
from words import save_tokenizer

from nemo_minitron.artifacts import Compensation, PrunePlan, Scores
from nemo_minitron.families import from_hf
from nemo_minitron.pruning.compensation import solvable
from nemo_minitron.search import plan

STEPS = 4
RECIPE = f"""
from nemo_minitron.job import *
def recipe():
    return Job(
        name="pico", teacher="teacher", data=Data("corpus.jsonl", "corpus.jsonl"), keep={{"hidden": 48}},
        search=Search(
            params="140K", proxy="losses", marginals=1, candidates=2, distil=1, steps={STEPS}, rounds=2, tokens=64,
        ),
        calibration=Calibration(samples=4, sequence_length=36, batch_size=2),
        distillation=Distillation(
            tokens=36 * 2 * {STEPS}, sequence_length=36, global_batch_size=2, learning_rate=1e-3, warmup_steps=1,
            precision="fp32", save_every=3,
        ),
        evaluation=Evaluation(tokens=64, sequence_length=32, precision="fp32"),
    )
"""


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("search")
    pico_llama(folder / "teacher", vocab_size=509)
    save_tokenizer(folder / "teacher", TEXTS, 509)
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (folder / "recipe.py").write_text(RECIPE)
    dry = minitron(folder, "compress", "recipe.py", "--dry-run")
    assert not (folder / "runs").exists()
    return folder, dry, minitron(folder, "compress", "recipe.py", "--out", "run")


def read(path):
    return json.loads(path.read_text())


def winner_of(ranks):
    return next(row["candidate"] for row in ranks if (row["step"], row["rank"]) == (STEPS, 1))


@pytest.mark.slow
def test_from_budget_to_report(searched):
    folder, dry, _ = searched
    run, teacher = folder / "run", from_hf(folder / "teacher")
    listed, measured, ranks = (read(run / "search" / f"{name}.json") for name in ("candidates", "measured", "ranks"))
    assert "2 are cut and measured, 1 distilled for 4 steps in 2 rounds" in dry
    assert "each axis is cut alone and measured at up to 1 sizes" in dry
    alone = read(run / "search" / "marginals.json")
    assert {row["axis"] for row in alone["cuts"]} == {"layers", "ffn"}
    assert all(row["kept"] > 0 for row in listed)
    assert "marginals, candidates, gates, compensate, measure, rank, plan, prune" in dry
    assert len(listed) == 2
    assert {row["name"] for row in measured} == {row["name"] for row in listed}
    assert [row["loss"] for row in measured] == sorted(row["loss"] for row in measured)
    assert {row["candidate"] for row in ranks} == {measured[0]["name"]}
    winner = winner_of(ranks)
    assert {row["step"] for row in ranks} == set(range(1, STEPS + 1))
    scores, made = Scores.load(run / "scores.safetensors"), PrunePlan.load(run / "plan.json")
    sizes = {name: next(row for row in listed if row["name"] == winner)[name] for name in ("layers", "ffn")}
    assert made.keep == plan(scores, sizes).keep
    assert made.target.hidden_size == teacher.hidden_size
    assert from_hf(run / "student") == made.target
    assert made.target.parameters() <= 140_000
    solved = Compensation.load(run / "search" / winner / "compensation.safetensors")
    assert dict(solvable(made)).keys() == solved.tensors.keys()
    pruned = raw_tensors(run / "checkpoints" / "pruned")
    assert (made.target.ffn_hidden_size == teacher.ffn_hidden_size) == (not solved.tensors)
    for name, tensor in solved.tensors.items():
        layer = name.split(".")[1]
        np.testing.assert_array_equal(pruned[f"model.layers.{layer}.mlp.down_proj.weight"], tensor.view(np.uint32))
    report = (run / "report.html").read_text()
    assert "Ranks of brief distillation" in report
    with open(run / "figures" / "ranks.csv", newline="") as file:
        assert [(int(r["step"]), r["candidate"]) for r in csv.DictReader(file)] == [
            (r["step"], r["candidate"]) for r in ranks
        ]
    assert not list(run.glob("search/*/distilled"))  # checkpoints that nothing goes on from


@pytest.mark.slow
def test_stopped_and_gone_on_is_one_training(searched):
    """The winner was stopped after half its steps; the job's own distillation of it, as long, was not."""
    run = searched[0] / "run"
    winner = winner_of(read(run / "search" / "ranks.json"))
    assert read(run / "search" / winner / "curve.json")["losses"] == losses(run / "checkpoints/distilled/loss.csv")


@pytest.mark.slow
def test_a_killed_search_goes_on(searched):
    """Its last stage's result is gone: nothing is cut, measured or trained again, and the winner is the same."""
    folder, *_ = searched
    run = folder / "run"
    before = (run / "search" / "ranks.json").read_bytes(), (run / "plan.json").read_bytes()
    (run / "search" / "ranks.json").unlink()
    output = minitron(folder, "compress", "recipe.py", "--out", "run")
    assert "measure: done before, skipped" in output
    assert f"to step {STEPS}" not in output.replace(f"step {STEPS}/{STEPS}", "")
    assert ((run / "search" / "ranks.json").read_bytes(), (run / "plan.json").read_bytes()) == before
