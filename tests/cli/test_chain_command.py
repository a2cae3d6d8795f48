"""A chain of two steps from the command line: the second one in two rounds, taught by the first teacher."""

import json

import pytest
from command_line import losses, minitron, start
from pico import raw_tensors

from nemo_minitron.artifacts import PrunePlan, Scores, compose
from nemo_minitron.commands.prune import Extras, compensation_of
from nemo_minitron.families import from_hf
from nemo_minitron.pruning import HFSource, prune
from nemo_minitron.sources.tensors import source_digest

pytestmark = pytest.mark.slow

CHAIN = """
from nemo_minitron.job import *
def recipe():
    return Job(
        name="pico-chain", teacher="teacher", data=Data("corpus.jsonl", "corpus.jsonl"),
        chain=(
            Step("80", keep={"ffn": 80}, calibration={"method": "magnitude"}),
            Step("64", keep={"ffn": 64, "layers": 4}, rounds=2, distillation={"intermediate": "auto", "tokens": 128}),
        ),
        calibration=Calibration(samples=4, sequence_length=32, batch_size=2),
        distillation=Distillation(tokens=64, sequence_length=32, learning_rate=1e-3, warmup_steps=1, precision="fp32"),
        evaluation=Evaluation(tokens=128, sequence_length=32, precision="fp32", random_baseline=False),
        base_model="a/base",
    )
"""


@pytest.fixture(scope="module")
def chain(world):
    """(its folder, what the command printed)"""
    (world / "chain.py").write_text(CHAIN)
    output = minitron(world, "compress", "chain.py", "--out", "chain")
    return world / "chain", output


def plan_of(folder):
    return PrunePlan.load(folder / "plan.json")


def test_each_step_is_a_whole_run_of_the_student_before(chain, world):
    folder, output = chain
    first, second = plan_of(folder / "80"), plan_of(folder / "64")
    assert first.source == from_hf(world / "teacher")
    assert second.source == first.target == from_hf(folder / "80" / "student")
    assert second.target == from_hf(folder / "64" / "student")
    assert (second.target.num_layers, second.target.ffn_hidden_size) == (4, 64)
    assert second.model_digest == source_digest(HFSource(folder / "80" / "student"))
    rows = json.loads((folder / "chain.json").read_text())
    assert [row["name"] for row in rows] == ["teacher", "80", "64"]
    assert [row["parameters"] for row in rows] == [p.parameters() for p in (first.source, first.target, second.target)]
    for row in rows:
        assert f"{row['parameters']:>16,}" in output
        assert f"{row['perplexity']:>14,.2f}" in output
    assert len(losses(folder / "64" / "student" / "loss.csv")) == 4


def test_the_second_round_scored_what_the_first_had_left(chain):
    """Its file says which model: the plan that is beside the scores, cut anew here; the final plan cuts on from it."""
    folder = chain[0] / "64"
    after_one, made = PrunePlan.load(folder / "rounds" / "2" / "plan.json"), plan_of(folder)
    scores = Scores.load(folder / "rounds" / "2" / "scores.safetensors")
    model = prune(chain[0] / "80" / "student", after_one, chain[0].parent / "between")
    assert scores.model_digest == source_digest(HFSource(model))
    assert (scores.architecture.num_layers, scores.architecture.ffn_hidden_size) == (5, 72)
    assert set(made.keep["layers"]) < set(after_one.keep["layers"])
    assert all(set(kept) < set(after_one.keep["ffn"][layer]) for layer, kept in made.keep["ffn"].items())
    assert not (folder / "rounds" / "2" / "model").exists()
    pruned = raw_tensors(folder / "checkpoints" / "pruned")
    teacher, scores = HFSource(chain[0] / "80" / "student"), folder / "scores.safetensors"
    extras = Extras(folder / "compensation.safetensors", scores=scores, scale_gaps=True)
    added = compensation_of(teacher, made, extras)
    again = raw_tensors(prune(teacher, made, chain[0].parent / "at-once", compensation=added))
    assert [name for name in pruned if pruned[name].tobytes() != again[name].tobytes()] == []


def test_the_student_learned_from_the_first_teacher_by_the_plan_of_both_cuts(chain):
    """The states compared are of the teacher's layers, which the loss's columns name."""
    folder = chain[0] / "64"
    recipe = json.loads((folder / "recipe.json").read_text())
    assert (recipe["learns_from"], recipe["teacher"]) == ("teacher", "chain/80/student")
    made = PrunePlan.load(folder / "lineage.json")
    assert made == compose(plan_of(chain[0] / "80"), plan_of(folder))
    card = (folder / "student" / "README.md").read_text()
    assert "base_model: a/base" in card
    assert "minitron compress pico-chain\n" in card
    assert f"| parameters | {made.source.parameters():,} | {made.target.parameters():,} |" in card


def test_a_rerun_does_nothing_and_its_folder_has_no_report_of_its_own(chain, world):
    output = minitron(world, "compress", "chain.py", "--out", "chain")
    assert output.count("done before, skipped") == 11 + 12
    process = start(world, "report", "chain")
    assert "give one of chain/80, chain/64" in process.communicate(timeout=100)[0].replace("\n", " ")
    assert process.returncode == 2
