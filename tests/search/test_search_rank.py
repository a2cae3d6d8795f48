"""Successive halving: who goes on, who stops, when the ranks have settled."""

import math

import pytest

from nemo_minitron.errors import InputError
from nemo_minitron.search import rank

LOSSES = {  # constant, but for one that starts behind and one that falls back
    "a": lambda step: 3.0,
    "b": lambda step: 2.0,
    "late": lambda step: 2.5 if step <= 4 else 1.0,
    "early": lambda step: 1.5 if step <= 8 else 4.0,
}


def measured(calls, losses=LOSSES):
    def measure(name, steps):
        calls.append((name, steps))
        return [(step, losses[name](step)) for step in range(1, steps + 1)]

    return measure


def test_the_worse_half_stops_after_each_round():
    calls = []
    found = rank(list(LOSSES), measured(calls), steps=12, rounds=3, marks=3)
    assert calls == [(n, 4) for n in LOSSES] + [("early", 8), ("b", 8), ("early", 12), ("b", 12)]
    assert found.stopped == {"a": 4, "late": 4}
    assert found.winner == "b"
    rows = [(row.step, row.candidate, row.loss, row.rank) for row in found.standings]
    assert rows == [
        (4, "early", 1.5, 1), (4, "b", 2.0, 2), (4, "late", 2.5, 3), (4, "a", 3.0, 4),
        (8, "early", 1.5, 1), (8, "b", 2.0, 2), (12, "b", 2.0, 1), (12, "early", 4.0, 2),
    ]  # fmt: skip
    assert found.settled == 12
    told = []
    five = LOSSES | {"worst": lambda step: 5.0}
    rank(list(five), measured([], five), steps=12, rounds=3, stop=told.append)
    assert told == ["a", "worst", "b"]  # five, three, two


def test_one_round_trains_all_to_the_end_as_the_papers_do():
    calls = []
    found = rank(list(LOSSES), measured(calls), steps=12, rounds=1, marks=6)
    assert calls == [(name, 12) for name in LOSSES]
    assert (found.winner, found.stopped) == ("late", {})
    assert {row.step for row in found.standings} == {2, 4, 6, 8, 10, 12}
    assert found.order(6) == ["late", "early", "b", "a"]
    assert found.order(12) == ["late", "b", "a", "early"]
    assert found.settled == 10  # from the mark on that first sees step 9


def test_a_mark_is_the_mean_since_the_one_before():
    found = rank(["x"], measured([], {"x": float}), steps=10, rounds=2, marks=4)
    assert [(row.step, row.loss) for row in found.standings] == [(2, 1.5), (5, 4.0), (8, 7.0), (10, 9.5)]


def test_what_diverges_is_last_and_ties_go_to_the_first():
    losses = {"bad": lambda step: math.nan, "x": lambda step: 1.0, "y": lambda step: 1.0}
    found = rank(list(losses), measured([], losses), steps=4, rounds=2)
    assert found.stopped == {"bad": 2}
    assert found.winner == "x"
    with pytest.raises(InputError, match="no candidate's distillation gives a finite loss at step 1"):
        rank(["bad"], measured([], losses), steps=4)


def test_refused():
    with pytest.raises(InputError, match="no candidate to rank"):
        rank([], measured([]), steps=4)
    with pytest.raises(InputError, match="distillation of 'a' has no loss for step 3"):
        rank(["a"], lambda name, steps: [(1, 1.0), (2, 1.0)], steps=4, rounds=1)
