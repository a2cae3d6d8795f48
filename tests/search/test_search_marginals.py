"""Measured losses of single axes as a guess for every shape: rises add up, and are interpolated between sizes."""

import numpy as np
import pytest
from pico import pico_llama

from nemo_minitron.families import from_hf
from nemo_minitron.search import make_space, search, targets
from nemo_minitron.search.marginals import Marginals, points_of


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """6 layers, hidden 64, ffn 96, 6 heads in 3 groups."""
    folder = tmp_path_factory.mktemp("model")
    pico_llama(folder)
    return from_hf(folder)


def columns(**sizes):
    return {name: np.array(values) for name, values in sizes.items()}


def test_rises_are_interpolated_and_added(source):
    losses = {"layers": {3: 5.0, 5: 2.5}, "ffn": {48: 3.0}}
    guess = Marginals(2.0, losses, {"layers": 6, "ffn": 96}, source.num_query_groups)
    found = -np.log(guess(columns(layers=[6, 5, 3, 5, 6], ffn=[96, 96, 96, 48, 72])))
    np.testing.assert_allclose(found, [0, 0.5, 3.0, 1.5, 0.5], atol=1e-12)  # two points of an axis make a line
    (between,) = -np.log(guess(columns(layers=[4], ffn=[96])))
    assert 0.5 < between < 1.75  # 1.75 would be on the line; the loss rises ever faster


def test_a_size_below_the_smallest_is_not_guessed(source):
    guess = Marginals(2.0, {"layers": {4: 3.0}}, {"layers": 6}, source.num_query_groups)
    np.testing.assert_array_equal(np.isnan(guess(columns(layers=[3, 4, 6]))), [True, False, False])


def test_heads_count_by_group(source):
    """Two heads a group in two groups cost the groups alone; one head a group costs what it did in all groups."""
    groups, heads = source.num_query_groups, source.num_attention_heads
    losses = {"heads": {groups: 3.0}, "query_groups": {groups - 1: 2.25}}
    guess = Marginals(2.0, losses, {"heads": heads, "query_groups": groups}, groups)
    per_group = heads // groups
    shapes = columns(heads=[heads, per_group * (groups - 1), groups - 1], query_groups=[groups, groups - 1, groups - 1])
    np.testing.assert_allclose(-np.log(guess(shapes)), [0, 0.25, 1.25], atol=1e-12)


@pytest.mark.parametrize(("count", "sizes"), [(1, [3]), (2, [3, 5]), (3, [3, 4, 5]), (9, [3, 4, 5])])
def test_points_are_spread_from_the_smallest_to_the_largest(source, count, sizes):
    space = make_space(source, lists={"layers": (3, 4, 5, 6)})
    assert points_of(space, "layers", count) == sizes


def test_an_axis_that_does_not_vary_has_no_points(source):
    space = make_space(source, lists={"layers": (3, 6)}, keep={"ffn": 64})
    assert points_of(space, "ffn", 4) == []


def test_a_search_ranks_by_it(source):
    """Both shapes have equal costs within the band; the guess alone decides."""
    space = make_space(source, lists={"layers": (5, 6), "ffn": (64, 96)})
    budget = [targets.parameters(source.parameters(), 0.5)]
    for bad in ("layers", "ffn"):
        losses = {"layers": {5: 2.1}, "ffn": {64: 2.1}} | {bad: {5 if bad == "layers" else 64: 4.0}}
        guess = Marginals(2.0, losses, {"layers": 6, "ffn": 96}, source.num_query_groups)
        order = [dict(shape.sizes) for shape in search(space, budget, proxy=guess).candidates]
        good = {"layers": 6, "ffn": 64} if bad == "layers" else {"layers": 5, "ffn": 96}
        assert order[:2] == [{"layers": 6, "ffn": 96}, good]
