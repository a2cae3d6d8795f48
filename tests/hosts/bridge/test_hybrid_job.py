"""`minitron compress` of a pico Mamba hybrid on Megatron-Bridge, with a search, from the folder to the card."""

import csv
import json
import re

import numpy as np
import pytest
from command_line import TEXTS, minitron
from pico import pico_nemotron_h, raw_tensors
from words import save_tokenizer

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.families import from_hf
from nemo_minitron.pruning.convert import convert
from nemo_minitron.sources.checkpoint import last_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.bridge]
RECIPE = """
name: pico
teacher: teacher
data: {train: corpus.jsonl, test: corpus.jsonl}
keep: {attention_layers: 1, mlp_layers: 1, hidden: 40, mamba_heads: 6}
search: {params: "70K", space: "mamba_layers=2,3;ffn=64,96", proxy: losses, marginals: 1, candidates: 2, distil: 1,
  steps: 2, rounds: 1, tokens: 64,
  latency: 100s, batch: 2, context: 40}
calibration: {samples: 4, sequence_length: 36, batch_size: 2}
distillation: {tokens: 432, sequence_length: 36, global_batch_size: 2, micro_batch_size: 1, learning_rate: 0.001,
  warmup_steps: 1, precision: fp32, save_every: 2, intermediate: auto}
evaluation: {tokens: 256, sequence_length: 32, precision: fp32, prompts: [the model], new_tokens: 4, every: 216}
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    save_tokenizer(pico_nemotron_h(folder / "teacher", vocab_size=509), TEXTS, 509)
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[:120]))
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "shown.txt").write_text(minitron(folder, "compress", "recipe.yaml", "--dry-run"))
    (folder / "said.txt").write_text(minitron(folder, "compress", "recipe.yaml", "--out", "run"))
    return folder


SHAPES = {"mamba_layers2-attention_layers1-mlp_layers1-hidden40-ffn96-mamba_heads6": (2, 96, 65_748)}
SHAPES["mamba_layers3-attention_layers1-mlp_layers1-hidden40-ffn64-mamba_heads6"] = (3, 64, 68_922)


def read(job, *path):
    return json.loads(job.joinpath("run", *path).read_text())


def test_the_search_measures_both_shapes_and_each_kind_of_layer_alone(job):
    """Two shapes fit the budget and do not fit inside one another; the cut with the lower loss is distilled."""
    alone = read(job, "search", "marginals.json")
    assert [(row["axis"], row["size"]) for row in alone["cuts"]] == [("mamba_layers", 2), ("ffn", 64)]
    cut = PrunePlan.load(job / "run" / "search" / "mamba_layers2" / "plan.json")
    assert sorted(cut.target.hybrid_pattern) == sorted("MM*--")  # of the kinds that stay whole nothing goes
    measured = read(job, "search", "measured.json")
    assert {row["name"]: (row["mamba_layers"], row["ffn"], row["parameters"]) for row in measured} == SHAPES
    assert measured[0]["loss"] < measured[1]["loss"]
    assert {row["candidate"] for row in read(job, "search", "ranks.json")} == {measured[0]["name"]}


def test_both_shapes_are_timed_and_a_remark_says_how(job):
    """A pico shape takes milliseconds, also of the code that is exact."""
    said, remark = (
        (job / "said.txt").read_text(),
        "remark: search.latency times a hybrid's Mamba layers in PyTorch code",
    )
    assert remark in said
    assert remark in (job / "shown.txt").read_text()
    assert len(re.findall(r"^ +\d+\.\d ms$", said, re.MULTILINE)) == 2
    assert "a latency of at most 100s, yet to be measured" in (job / "shown.txt").read_text()


def test_the_student_is_the_one_that_the_search_chose(job):
    plan, student = PrunePlan.load(job / "run" / "plan.json"), from_hf(job / "run" / "student")
    assert student == plan.target
    mamba, ffn, parameters = SHAPES[read(job, "search", "measured.json")[0]["name"]]
    assert sorted(student.hybrid_pattern) == sorted("M" * mamba + "*-")
    assert (student.hidden_size, student.ffn_hidden_size, student.mamba_num_heads) == (40, ffn, 6)
    assert student.parameters() == parameters
    random = from_hf(job / "run" / "checkpoints" / "random")
    assert (random.parameters(), sorted(random.hybrid_pattern)) == (parameters, sorted(student.hybrid_pattern))
    shown = (job / "shown.txt").read_text()
    assert f"{from_hf(job / 'teacher').parameters():,}" in shown
    assert "4 shapes, 3 with at most 70,000 parameters" in shown


def test_the_students_folder_has_the_bits_of_the_training(job, tmp_path):
    """`convert` reads Bridge's last checkpoint by another way than the export."""
    folder = convert(last_checkpoint(job / "run" / "checkpoints" / "distilled"), tmp_path / "folder")
    own, found = raw_tensors(job / "run" / "student"), raw_tensors(folder)
    assert own.keys() == found.keys()
    assert [name for name in own if not np.array_equal(own[name], found[name])] == []
    start = raw_tensors(job / "run" / "checkpoints" / "pruned")
    assert [name for name in own if np.array_equal(own[name], start[name])] == []  # every tensor was trained


def test_the_gates_see_mamba_heads_too(job):
    """In ranked order its heads move within their groups; of what is cut, layers and neurons are exact for masks."""
    found = {gate["name"]: gate for gate in json.loads((job / "run" / "gates.json").read_text())["gates"]}
    same = ("teacher in ranked order", "student that keeps everything", "slices are masks")
    assert [found[name]["state"] for name in same] == ["passed"] * 3
    assert found["teacher in ranked order"]["figure"] > 0


def test_the_student_is_measured_along_the_training(job):
    rows = json.loads((job / "run" / "trajectory.json").read_text())["rows"]
    assert [row["step"] for row in rows] == [0, 3, 6]
    numbers = {row["stage"]: row["loss"] for row in json.loads((job / "run" / "numbers.json").read_text())}
    assert [rows[0]["loss"], rows[2]["loss"]] == [numbers["pruned"], numbers["distilled"]]


def test_numbers_and_card(job):
    rows = list(csv.DictReader((job / "run" / "checkpoints" / "distilled" / "loss.csv").open()))
    assert len(rows) == 6
    assert float(rows[-1]["logits"]) < float(rows[0]["logits"])
    stages = [row["stage"] for row in json.loads((job / "run" / "numbers.json").read_text())]
    assert {"teacher", "random", "pruned", "distilled"} <= {*stages}
    card = (job / "run" / "student" / "README.md").read_text()
    (kept,) = {row[0] for name, row in SHAPES.items() if name == read(job, "search", "measured.json")[0]["name"]}
    assert f"| Mamba layers | 3 | {kept} |" in card or kept == 3
    assert "| Mamba heads | 8 | 6 |" in card
    assert "transformers#47246" in card
