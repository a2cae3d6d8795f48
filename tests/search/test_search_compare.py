"""How close a cut is, and what two plans may differ in."""

import numpy as np
import pytest
from test_search_plans import SOURCE, scores

from nemo_minitron.errors import InputError
from nemo_minitron.search import compare_plans, plan, random_plan, threshold_band


def spread(gap):
    """ffn scores 1..20 in each layer; 9 stay: the threshold is between 11 and 12, which `gap` separates."""
    s = scores()
    s.tensors["ffn"][:] = np.arange(1, 21)
    s.tensors["ffn"][2, 10:12] = 11.5 * (1 - gap / 2), 11.5 * (1 + gap / 2)
    return s


def test_band():
    s = spread(1e-4)
    made = plan(s, {"ffn": 9})
    assert threshold_band(s, made, 1e-5) == {"ffn": 0}
    assert threshold_band(s, made, 1e-4) == {"ffn": 2}  # both sides of layer 2's threshold
    assert threshold_band(s, made, 0.05) == {"ffn": 2 * 4}
    assert threshold_band(s, plan(s, {}), 1.0) == {}


def test_band_of_each_axis():
    s = scores()
    s.tensors["hidden"][:] = np.arange(12)
    s.tensors["layers"][:] = [4, 1, 3, 1]
    s.tensors["heads"][:] = [1, 1, 1, 2, 5, 5]
    made = plan(s, {"hidden": 5, "layers": 3, "heads": 3})
    # hidden's threshold is 6.5; layers 1 and 3 tie; two of three groups tie in each of three layers
    assert threshold_band(s, made, 0.1) == {"layers": 2, "hidden": 2, "heads": 3 * 4}


def test_listed_layers_without_scores():
    s = scores(without=("query_groups", "layers"))
    assert threshold_band(s, plan(s, {"layers": [0, 3]}), 1.0) == {"layers": 0}


def test_identical():
    s = scores()
    keep = {"ffn": 9, "hidden": 7, "layers": 3, "heads": 3}
    assert compare_plans(plan(s, keep), plan(s, keep), s, 0.0) == (True, 0, 0)


def test_inside_and_outside():
    s = spread(1e-6)
    a, b, c = plan(s, {"ffn": 9}), plan(s, {"ffn": 9}), plan(s, {"ffn": 9})
    assert a.keep["ffn"][2] == list(range(11, 20))
    b.keep["ffn"][2] = [10, *range(12, 20)]  # 10 for 11: too close to call
    assert compare_plans(a, b, s, 1e-5) == (False, 2, 0)
    assert compare_plans(a, b, s, 1e-8) == (False, 0, 2)
    c.keep["ffn"][1] = [0, *range(12, 20)]  # 0 for 11: never
    assert compare_plans(a, c, s, 1e-5) == (False, 0, 2)
    assert compare_plans(c, a, s, 1e-5) == (False, 0, 2)
    assert compare_plans(b, c, s, 1e-5) == (False, 2, 2)


def test_perturbed_scores_differ_inside_twice_the_error():
    """Scores that are right to 1e-3 move only units that lie within 2e-3 of the threshold."""
    generator = np.random.default_rng(0)
    keep = {"ffn": 9, "hidden": 7, "layers": 3, "heads": 3}
    differed = 0
    for seed in range(200):
        s = scores(seed)
        for array in s.tensors.values():
            array += 1  # a narrow range: close calls happen
        near = scores(seed)
        for name, array in s.tensors.items():
            near.tensors[name] = (array * (1 + generator.uniform(-1e-3, 1e-3, array.shape))).astype(np.float32)
        found = compare_plans(plan(s, keep), plan(near, keep), s, 2.1e-3)
        assert found.outside == 0
        differed += not found.identical
    assert differed > 5


def test_layers_that_only_one_keeps():
    s = scores()
    a, b = plan(s, {"layers": [0, 1], "ffn": 9}), plan(s, {"layers": [0, 2], "ffn": 9})
    assert compare_plans(a, b, s, 0.0) == (False, 0, 2)  # layers 1 and 2; their neurons are not compared


def test_other_sizes():
    s = scores()
    with pytest.raises(InputError, match="same source and target"):
        compare_plans(plan(s, {"ffn": 9}), random_plan(SOURCE, {"ffn": 8}), s, 0.0)
