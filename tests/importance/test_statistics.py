"""Aggregations as states: merged shards equal the whole, in float64, and the order of the steps matters."""

import numpy as np
import pytest
import torch

from nemo_minitron.artifacts.statistics import AGGREGATIONS, criterion
from nemo_minitron.errors import InputError
from nemo_minitron.importance.statistics import over_samples, over_sequence, with_counts

REFERENCE = {
    "mean": lambda v: v.abs().mean(0),
    "l2": lambda v: v.square().sum(0).sqrt(),
    "var": lambda v: v.var(0, unbiased=False),
    "max": lambda v: v.abs().amax(0),
}


def start(name, values, ids=None, samples=3):
    """The state of activations [P, samples, C], with a leading row dimension as the accumulator has it."""
    heavy = tuple(part.double()[None] for part in over_sequence(name, values, ids, samples))
    counts = (
        torch.full((samples,), float(len(values))) if ids is None else torch.bincount(ids[ids >= 0], minlength=samples)
    )
    return with_counts(name, heavy, counts.double())


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
@pytest.mark.parametrize("cuts", [(1,), (5,), (3, 9), (1, 2, 10)])
def test_merged_parts_equal_the_whole(name, cuts):
    """A mean far from zero: n, sum and sum of squares in fp32 would lose the variance."""
    values = torch.randn(12, 3, 7, generator=torch.Generator().manual_seed(1)) + 1000.0
    aggregation = AGGREGATIONS[name]
    parts = torch.tensor_split(values, cuts)
    state = start(name, parts[0])
    for part in parts[1:]:
        state = aggregation.merge(state, start(name, part))
    assert len(state) == len(aggregation.fields)
    torch.testing.assert_close(aggregation.finish(state)[0], REFERENCE[name](values.double()), rtol=1e-6, atol=0)
    in_numpy = aggregation.finish(tuple(field.numpy() for field in state))
    np.testing.assert_allclose(in_numpy, aggregation.finish(state).numpy(), rtol=1e-15)


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
def test_positions_of_several_samples_in_one_row(name):
    """Three samples joined in a row, some positions nobody's; an empty one gives 0 and merges as nothing."""
    values = torch.randn(12, 1, 7, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([0, 0, 0, -1, 2, 2, 2, 2, 2, -1, -1, 2])[:, None]
    state = start(name, values, ids)
    finished = AGGREGATIONS[name].finish(state)[0]
    for sample in (0, 2):
        expected = REFERENCE[name](values[ids[:, 0] == sample, 0].double())
        torch.testing.assert_close(finished[sample], expected, rtol=1e-6, atol=1e-9)
    assert (finished[1] == 0).all()
    empty = tuple(torch.zeros_like(field) for field in state)
    for merged in (AGGREGATIONS[name].merge(state, empty), AGGREGATIONS[name].merge(empty, state)):
        for a, b in zip(merged, state, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
def test_heads_in_the_place_of_positions(name):
    values = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(3))  # 3 positions x 2 heads
    ids = torch.tensor([[0, 1], [0, -1], [-1, 1]])
    finished = AGGREGATIONS[name].finish(
        with_counts(
            name,
            tuple(part.double()[None] for part in over_sequence(name, values, ids, 2)),
            torch.tensor([4.0, 4.0], dtype=torch.float64),
        )
    )[0]
    torch.testing.assert_close(finished[0], REFERENCE[name](values[:4, 0].double()), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(finished[1], REFERENCE[name](values[[0, 1, 4, 5], 1].double()), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
def test_halves_of_the_samples_merge_to_all(name):
    values = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    deal = torch.tensor([[1.0, 0], [0, 1], [0, 0], [0, 1], [1, 0]], dtype=torch.float64)  # the third does not count
    state = over_samples(name, values, deal)
    halves = [tuple(field[:, k] for field in state) for k in (0, 1)]
    kept = values[:, [0, 1, 3, 4]].transpose(0, 1)
    merged = AGGREGATIONS[name].finish(AGGREGATIONS[name].merge(*halves))
    torch.testing.assert_close(merged, REFERENCE[name](kept), rtol=1e-12, atol=0)
    first = AGGREGATIONS[name].finish(halves[0])
    torch.testing.assert_close(first, REFERENCE[name](values[:, [0, 4]].transpose(0, 1)), rtol=1e-12, atol=0)


def test_finished_values_do_not_merge():
    """Root of a sum is not a sum of roots: what a reduction of finished values would give."""
    values = torch.ones(4, 1, 1)
    l2 = AGGREGATIONS["l2"]
    halves = [l2.finish(start("l2", half, samples=1)) for half in values.split(2)]
    assert sum(halves) > 1.4 * l2.finish(start("l2", values, samples=1))


@pytest.mark.parametrize("name", ["l2", "l2,mean,max", "l3,mean", ""])
def test_unknown_criteria_are_refused(name):
    with pytest.raises(InputError, match=r"aggregation|must be two"):
        criterion(name)
