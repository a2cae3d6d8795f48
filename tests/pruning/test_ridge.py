"""The ridge that is chosen on rows which the fit did not read, against the errors of solved matrices.

Mutations tried by hand, each of which makes tests here fail: the error on the half that was fitted; one way alone; the
damping as a share of the fitted half's mean; the cross term's sign.
"""

import numpy as np
import pytest
from pico import pico_llama, pico_mixtral
from plans_by_hand import width_and_depth

from nemo_minitron.artifacts.dtypes import as_numbers
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.pruning import HFSource, student_index
from nemo_minitron.pruning.compensation import solve
from nemo_minitron.pruning.defaults import RIDGE
from nemo_minitron.pruning.ridge import RIDGES, chosen_ridge
from nemo_minitron.search import random_plan
from nemo_minitron.sources.tensors import whole

DOWN, WIDTH = "layers.1.down.weight", 96


@pytest.fixture
def cut(tmp_path):
    """A teacher's source, and a plan that cuts layers, hidden, ffn and heads."""
    teacher = pico_llama(tmp_path / "t")
    return HFSource(teacher), width_and_depth(from_hf(teacher))


def halves(tokens, noise, seed=0):
    """Inputs [tokens, WIDTH] of each half, which share their directions; the second half is longer."""
    generator = np.random.default_rng(seed)
    mix = generator.normal(size=(30, WIDTH))
    return [generator.normal(size=(n, 30)) @ mix + noise * generator.normal(size=(n, WIDTH)) for n in tokens]


def held_out_errors(source, plan, inputs):
    """[candidates], by solved matrices. `solve` takes the ridge as a share of the fitted half's own mean."""
    origin, (rows, kept) = student_index(plan, DOWN)
    raw = source.read(origin, whole(source.architecture.shapes()[origin]))
    teacher = as_numbers(raw, source.dtype(origin))[rows].astype(np.float64)
    means = [np.mean(np.sum(x[:, kept] ** 2, axis=0)) for x in inputs]
    found = np.zeros(len(RIDGES))
    for (fit, test), mean in zip((inputs, inputs[::-1]), means, strict=True):
        for place, ridge in enumerate(RIDGES):
            matrix = solve(source, plan, DOWN, fit.T @ fit, ridge * sum(means) / mean).astype(np.float64)
            found[place] += np.sum((test @ teacher.T - test[:, kept] @ matrix.T) ** 2)
    return found


@pytest.mark.parametrize(("tokens", "noise"), [((60, 80), 1.0), ((400, 500), 0.3), ((40, 45), 3.0)])
def test_the_least_error_on_the_other_half(cut, tokens, noise):
    source, plan = cut
    inputs = halves(tokens, noise)
    expected = RIDGES[np.argmin(held_out_errors(source, plan, inputs))]
    assert chosen_ridge(source, plan, DOWN, np.stack([x.T @ x for x in inputs])) == expected


def test_more_rows_need_less(cut):
    """Fewer rows than channels need much damping."""
    few, many = (np.stack([x.T @ x for x in halves((n, n), 1.0)]) for n in (40, 4000))
    assert chosen_ridge(*cut, DOWN, many) < chosen_ridge(*cut, DOWN, few) / 5


def test_nothing_to_choose_on(cut):
    """Inputs that were always 0: the default. Samples in one half alone are refused."""
    nothing, x = np.zeros((WIDTH, WIDTH)), halves((50, 50), 1.0)[0]
    assert chosen_ridge(*cut, DOWN, np.stack([nothing, nothing])) == RIDGE
    with pytest.raises(InputError, match="all samples fell into one half; give more samples"):
        chosen_ridge(*cut, DOWN, np.stack([x.T @ x, nothing]))


@pytest.mark.parametrize(
    ("grams", "message"),
    [(np.zeros((2, 95, 95)), "96 channels"), (np.stack([np.eye(96), np.diag([np.nan] * 96)]), "not finite")],
)
def test_what_solve_would_refuse(cut, grams, message):
    with pytest.raises(InputError, match=message):
        chosen_ridge(*cut, DOWN, grams)


def test_an_expert_to_which_one_half_sent_no_token(tmp_path):
    source = HFSource(pico_mixtral(tmp_path / "t"))
    plan = random_plan(source.architecture, keep={"expert_ffn": 24})
    gram = np.eye(source.architecture.moe_ffn_hidden_size)
    assert chosen_ridge(source, plan, "layers.0.experts.1.down.weight", np.stack([gram, 0 * gram])) == RIDGE
