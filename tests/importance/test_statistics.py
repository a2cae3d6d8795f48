"""Aggregations as states: merged shards equal the whole, in float64, and the order of the steps matters."""

import pytest
import torch

from nemo_minitron.errors import InputError
from nemo_minitron.importance.statistics import AGGREGATIONS, criterion

REFERENCE = {
    "mean": lambda v: v.abs().mean(0),
    "l2": lambda v: v.square().sum(0).sqrt(),
    "var": lambda v: v.var(0, unbiased=False),
    "max": lambda v: v.abs().amax(0),
}


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
@pytest.mark.parametrize("cuts", [(1,), (5,), (3, 9), (1, 2, 10)])
def test_merged_parts_equal_the_whole(name, cuts):
    """A mean far from zero: n, sum and sum of squares in fp32 would lose the variance."""
    values = torch.randn(12, 3, 7, generator=torch.Generator().manual_seed(1)) + 1000.0
    aggregation = AGGREGATIONS[name]
    parts = torch.tensor_split(values, cuts)
    state = aggregation.start(parts[0])
    for part in parts[1:]:
        state = aggregation.merge(state, aggregation.start(part))
    assert len(state) == len(aggregation.fields)
    torch.testing.assert_close(aggregation.finish(state), REFERENCE[name](values.double()), rtol=1e-6, atol=0)


def test_finished_values_do_not_merge():
    """Root of a sum is not a sum of roots: what a reduction of finished values would give."""
    values = torch.ones(4, 1)
    l2 = AGGREGATIONS["l2"]
    halves = [l2.finish(l2.start(half)) for half in values.split(2)]
    assert sum(halves) > 1.4 * l2.finish(l2.start(values))


def test_batch_first_is_another_number():
    """l2 over samples of a mean over the sequence, not the other way round."""
    values = torch.tensor([[1.0, 3.0], [0.0, 0.0]])  # [sequence, batch]
    over_samples, over_sequence = criterion("l2,mean")
    per_sample = over_sequence.finish(over_sequence.start(values))
    assert over_samples.finish(over_samples.start(per_sample)).item() == pytest.approx((0.5**2 + 1.5**2) ** 0.5)


@pytest.mark.parametrize("name", ["l2", "l2,mean,max", "l3,mean", ""])
def test_unknown_criteria_are_refused(name):
    with pytest.raises(InputError, match=r"aggregation|must be two"):
        criterion(name)
