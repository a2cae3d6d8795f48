"""The compensate stage on a mixture of experts: a rank that holds an expert re-fits its matrix. Dense models and
pipeline stages are tested in tests/cli/test_compensate_command.py.

Two mutations were tried, and each fails here: only the dense layers' first rank re-fits; a pass forgets a layer.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import TEXTS
from grams64 import grams64
from pico import pico_mixtral
from ranks import run_ranks
from tolerances import GRAM_FP32
from words import save_tokenizer

from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.artifacts.files import write_json
from nemo_minitron.artifacts.typed import plain
from nemo_minitron.costs import gram_bytes
from nemo_minitron.data import Tokens, build, load_tokenizer
from nemo_minitron.families import from_hf
from nemo_minitron.importance.samples import samples_of
from nemo_minitron.pruning import HFSource
from nemo_minitron.pruning.compensation import solvable, solve
from nemo_minitron.pruning.defaults import AUTO, RIDGE
from nemo_minitron.pruning.ridge import chosen_ridge
from nemo_minitron.search import random_plan
from nemo_minitron.settings.calibration import Calibration
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.orders import CompensateOrder

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "compensate_worker.py"
ROWS = {"samples": 6, "sequence_length": 36, "batch_size": 1, "precision": "fp32", "seed": 7}
LAYOUTS = [Layout(ep=2, dp=2), Layout(tp=2, etp=1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    pico_mixtral(models / "teacher", num_attention_heads=8, num_key_value_heads=4)
    save_tokenizer(models / "teacher", TEXTS, 509)
    (models / "corpus.txt").write_text("\n".join(TEXTS))
    build(models / "corpus.txt", load_tokenizer(models / "teacher"), models / "corpus")
    keep = {"expert_ffn": 24, "experts": 3, "heads": 4, "layers": 5}
    random_plan(from_hf(models / "teacher"), keep=keep).save(models / "plan.json")
    return models


def solved(folder, layout, ridge):
    """(Plan, the Compensation of a pass that takes two layers, the rows that it read)."""
    out, plan = folder / "solved", PrunePlan.load(folder / "plan.json")
    memory, plans = (4 if ridge == AUTO else 2) * gram_bytes(plan.source, layout), {folder / "plan.json": out}
    order = CompensateOrder(folder / "teacher", plans, folder / "corpus", ridge, memory, Calibration(**ROWS), layout)
    write_json(folder / "order.json", plain(order))
    run_ranks(2, WORKER, folder / "order.json")
    rows = Tokens(folder / "corpus").windows(ROWS["sequence_length"], ROWS["samples"], ROWS["seed"])
    return plan, Compensation.load(out), rows


@pytest.mark.parametrize("layout", LAYOUTS, ids=["ep2-dp2", "tp2-etp1"])
def test_a_ridge_for_each_matrix(folder, layout):
    """Chosen on halves of the samples, with matrices of float64: the same in each layout, and more than one."""
    (plan, compensation, rows), source = solved(folder, layout, AUTO), HFSource(folder / "teacher")
    half = torch.cat([samples_of({"tokens": row[None]}).deal.argmax(1) for row in rows]) == 1
    grams = [grams64(folder / "teacher", rows, part[:, None].expand_as(rows)) for part in (~half, half)]
    found = compensation.notes["ridge of each matrix"]
    assert len(set(found.values())) > 1
    for name, origin in solvable(plan):
        both = np.stack([gram[origin] for gram in grams])
        ridge = chosen_ridge(source, plan, name, both)
        assert found[name] == pytest.approx(ridge, rel=0.01)
        expected, bound = solve(source, plan, name, both.sum(0), ridge), 100 * GRAM_FP32 * max(1, RIDGE / ridge)
        np.testing.assert_allclose(compensation.tensors[name], expected, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["ep2-dp2", "tp2-etp1"])
def test_experts_over_ranks(folder, layout):
    """A pass takes two layers. The matrices equal those that float64 gives."""
    (plan, compensation, rows), source = solved(folder, layout, 0.01), HFSource(folder / "teacher")
    grams, found = grams64(folder / "teacher", rows), compensation.tensors
    assert found.keys() == dict(solvable(plan)).keys()
    assert len(found) == 5 * (3 + 1)
    for name, origin in solvable(plan):
        expected = solve(source, plan, name, grams[origin])
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=100 * GRAM_FP32, err_msg=name)
