"""Families that are no Llama by their tables, distilled in two layouts: the losses of one process, on the host that is
installed here. Samples have masks of unlike lengths.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from tolerances import LOSS_LAYOUT_FP32
from words import save_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "families"))
sys.path.insert(0, str(Path(__file__).parent / "bridge"))

import contract
from test_families import keep_of, make, of_family

from nemo_minitron.commands.distill import export_student
from nemo_minitron.data import build, load_tokenizer
from nemo_minitron.families import from_hf, read_config
from nemo_minitron.hosts import chosen
from nemo_minitron.pruning import prune
from nemo_minitron.sources.folder import HFSource
from nemo_minitron.sources.tensors import whole

pytestmark = pytest.mark.slow
NEMO = chosen()[0] == "nemo"
WORKER = Path(__file__).parent / ("nemo/distill_worker.py" if NEMO else "bridge/bridge_worker.py")
FAMILIES = ["mistral-own", "qwen2-own", "qwen3-own", "nemotron-other", "phi3-own"]
FAMILIES += ["arcee-other", "seed_oss-own", "ministral-own", "smollm3-own", "qwen3_moe-other"]
FAMILIES += [] if NEMO else ["granite-other", "phi3-long", "arcee-yarn", "gemma2-own", "gemma3_text-own", "gpt_oss-own"]
FAMILIES += [] if NEMO else ["deepseek_v2-own", "deepseek_v3-own", "qwen2_moe-other"]
TEXTS = [f"the model number {i} reads {i * 7} words and the next {'word ' * (i % 9)}ends." for i in range(100)]
RECIPE = {
    "tokens": 24 * 4 * 2, "sequence_length": 24, "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-3,
    "warmup_steps": 1, "precision": "fp32",
}  # fmt: skip
LAYOUTS = {"one": {}, "tp": {"tp": 2, "sp": True}, "pp": {"pp": 2}}
CASES = [
    {
        "name": f"{family}-{name}", "teacher": family, "student": f"{family}-student", "plan": f"{family}-plan.json",
        "corpus": f"{family}-corpus",
        "layout": of_family(family, layout), "layouts": [of_family(family, layout)], "recipe": RECIPE,
        "world": 2 if layout else 1,
    }
    for family in FAMILIES
    for name, layout in (LAYOUTS | ({"cp": {"cp": 2}} if family == "phi3-long" else {})).items()
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each with a corpus of its own: transformers 5 gives every Qwen2 the same way to part words."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    for name in FAMILIES:
        teacher = make(folder / name, name)
        save_tokenizer(teacher, TEXTS, 509)
        build(folder / "corpus.jsonl", load_tokenizer(teacher), folder / f"{name}-corpus")
        plan = contract.plan_of(from_hf(teacher), keep_of(name))
        plan.save(folder / f"{name}-plan.json")
        prune(teacher, plan, folder / f"{name}-student")
    return folder


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    """The folder of all trainings; one worker for each number of processes."""
    out = tmp_path_factory.mktemp("trainings")
    for world in (1, 2):
        run_ranks(world, WORKER, models, json.dumps([case for case in CASES if case["world"] == world]), out)
    return out


def losses(folder):
    return np.array([float(row["loss"]) for row in csv.DictReader((folder / "loss.csv").open())])


@pytest.mark.parametrize("case", [case for case in CASES if case["world"] > 1], ids=lambda case: case["name"])
def test_losses_equal_one_process(case, results):
    expected = losses(results / f"{case['teacher']}-one")
    assert len(expected) == 2
    assert expected[1] != expected[0]
    np.testing.assert_allclose(losses(results / case["name"]), expected, rtol=LOSS_LAYOUT_FP32)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trained_student_is_exported(family, models, results, tmp_path):
    """As `minitron distill` ends: the last checkpoint is the student's folder again, with other weights; a router's
    correction bias, which no gradient reaches, is as it was, bit for bit."""
    base = HFSource(models / f"{family}-student")
    made = HFSource(export_student(results / f"{family}-pp", base, tmp_path / "student"))
    assert made.architecture == base.architecture
    assert read_config(tmp_path / "student") == base.config
    moved = [
        n for n, s in base.architecture.shapes().items() if (made.read(n, whole(s)) != base.read(n, whole(s))).any()
    ]
    still = {name for name in base.architecture.shapes() if name.endswith("expert_bias")}
    assert {*moved} == base.architecture.shapes().keys() - still
    assert bool(still) == family.startswith("deepseek_v3")
