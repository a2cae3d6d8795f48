"""A model of every family with its units in another order, and with zeros in place of what a plan removes.

Mutations tried, each of which fails here: k and v left in their order; the experts' numbers not moved; masks on the
first units instead of on those that the plan removes; a dropped layer that keeps writing.
"""

import contract
import numpy as np
import pytest
from contract import NAMES
from pico import pico_deepseek_v3
from test_family_contract import loaded, logits
from tolerances import LOGITS_PICO_FP32

from nemo_minitron.artifacts import Scores
from nemo_minitron.artifacts.scores import expected_shapes
from nemo_minitron.families import family_of
from nemo_minitron.pruning import HFSource, prune
from nemo_minitron.pruning.convert import identity
from nemo_minitron.pruning.rearranged import Masked, Reordered
from nemo_minitron.search import on_axes, ranked_order

TOKENS = np.random.default_rng(3).integers(0, 509, (2, 24))


def answers(source, plan, folder):
    return logits(loaded(prune(source, plan, folder)), TOKENS)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_in_ranked_order_is_the_same_model(name, tmp_path):
    moved = same_in_ranked_order(contract.make(tmp_path / "t", name), tmp_path / "s")
    assert {"hidden", "heads", "query_groups"} < moved
    assert moved & {"ffn", "expert_ffn"}


def test_experts_stay_in_their_routers_group(tmp_path):
    """A router that chooses groups first is another one if experts change their group."""
    groups = {"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
    assert "experts" in same_in_ranked_order(pico_deepseek_v3(tmp_path / "t", **groups), tmp_path / "s")


def same_in_ranked_order(folder, out):
    """Checks that the model with its units in the order of random scores gives the same logits; the axes that moved."""
    teacher, random = HFSource(folder), np.random.default_rng(7)
    shapes = expected_shapes(teacher.architecture)
    order = ranked_order(Scores(teacher.architecture, {axis: random.random(shape) for axis, shape in shapes.items()}))
    ordered = Reordered(teacher, order)
    assert not np.array_equal(raw(ordered), raw(teacher))
    found, before = answers(ordered, identity(teacher.architecture), out), logits(loaded(folder), TOKENS)
    assert before.std() > 0.1
    assert np.abs(found - before).max() < LOGITS_PICO_FP32
    return {axis for axis, units in order.items() if units not in (list(range(len(units))),)}


def raw(source):
    rows, columns = source.architecture.shapes()["embedding.weight"]
    return source.read("embedding.weight", (np.arange(rows), np.arange(columns)))


@pytest.mark.parametrize("name", NAMES)
def test_slices_are_masks_on_exact_axes(name, tmp_path):
    teacher = HFSource(contract.make(tmp_path / "t", name))
    axes = family_of(teacher.config).exact_axes
    whole = contract.plan_of(teacher.architecture, contract.everything())
    plan = on_axes(whole, axes)
    assert {"layers", "heads"} < plan.keep.keys() == whole.keep.keys() & axes
    assert plan.target.hidden_size == plan.source.hidden_size
    assert plan.target.num_layers < plan.source.num_layers
    sliced = answers(teacher, plan, tmp_path / "s")
    masked = answers(Masked(teacher, plan), identity(teacher.architecture), tmp_path / "m")
    assert np.abs(sliced - masked).max() < LOGITS_PICO_FP32
    assert np.abs(sliced - logits(loaded(tmp_path / "t"), TOKENS)).max() > 100 * LOGITS_PICO_FP32


def test_a_plan_of_other_axes_alone_has_no_exact_part(tmp_path):
    teacher = HFSource(contract.make(tmp_path / "t", "llama-own"))
    keep = {"hidden": contract.CUT_HIDDEN}
    plan = contract.plan_of(teacher.architecture, contract.nothing() | keep)
    plan.keep = keep
    assert on_axes(plan, family_of(teacher.config).exact_axes) is None
