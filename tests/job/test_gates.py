"""When a gate opens: what is rounding and what is not, what is noise and what is not."""

from pathlib import Path

import numpy as np
import pytest

from nemo_minitron.errors import GateError
from nemo_minitron.evaluation import Answers, Windows
from nemo_minitron.job.gates import LIMITS, MARGIN, SHARE, better, check_open, guesses, left_out, same


def windows(losses, positions=10):
    losses = np.asarray(losses, np.float64)
    return Windows(losses * positions, np.zeros((len(losses), positions), np.int32))


def answers(logits):
    return Answers(windows([1.0] * len(logits)), np.asarray(logits, np.float32))


@pytest.mark.parametrize("precision", LIMITS)
def test_logits_are_the_same_up_to_the_limit(precision):
    logits = np.random.default_rng(0).normal(size=(2, 3, 50)) * 7 + 2
    spread = logits.std()
    for share, state in ((0.0, "passed"), (0.9, "passed"), (1.1, "failed")):
        gate = same("name", answers(logits), answers(logits + share * LIMITS[precision] * spread), precision)
        assert gate.state == state
        assert gate.figure == pytest.approx(share * LIMITS[precision], rel=1e-3, abs=1e-12)
        assert gate.limit == LIMITS[precision]


def test_one_wrong_position_of_many_is_seen():
    """A fault that a few positions show, such as one expert's: the mean hides none of it."""
    logits = np.random.default_rng(0).normal(size=(8, 16, 50))
    wrong = logits.copy()
    wrong[3, 5] = wrong[3, 5][::-1]
    assert same("name", answers(logits), answers(wrong), "fp32").state == "failed"


NOISY = np.array([0.3, -0.3, 0.2, -0.2, 0.1, -0.1, 0.3, -0.3])


@pytest.mark.parametrize(
    ("gap", "noise", "state"),
    [
        (0.5, NOISY, "passed"),
        (0.05, NOISY, "undecided"),
        (-0.05, NOISY, "undecided"),
        (-0.3, NOISY, "undecided"),  # 3.3 standard errors
        (-0.5, NOISY, "failed"),
        (-MARGIN / 2, NOISY / 1000, "undecided"),  # certain, and too little to matter
        (-MARGIN * 2, NOISY / 1000, "failed"),
        (MARGIN / 10, NOISY / 1000, "passed"),
    ],
)
def test_an_order_is_stopped_only_beyond_noise(gap, noise, state):
    """Row by row, so that what is hard in the text counts as no noise."""
    hard = np.arange(8) * 3.0
    gate = better("name", windows(hard), windows(hard + gap + noise), windows(hard - 0.01))
    assert gate.state == state
    assert gate.figure == pytest.approx(gap)
    assert gate.error == pytest.approx(noise.std(ddof=1) / np.sqrt(8))


def test_an_order_that_costs_little_beside_the_cut_is_not_stopped():
    hard, sure = np.arange(8) * 3.0, NOISY / 1000
    for share, state in ((0.9, "undecided"), (1.1, "failed")):
        bad = windows(hard - share * SHARE * 2.0 + sure)
        assert better("name", windows(hard), bad, windows(hard - 2.0)).state == state


def test_a_single_row_decides_nothing():
    gate = better("name", windows([5.0]), windows([1.0]), windows([0.5]))
    assert (gate.state, gate.error) == ("undecided", None)


def test_a_teacher_that_guesses_has_no_order_of_units():
    assert guesses(windows([5.0, 5.4]), 509) == ""
    said = "the teacher hardly knows the text: its loss is 5.25 nats, and that of guessing a token 6.23"
    assert guesses(windows([5.0, 5.5]), 509) == said


def test_what_failed_is_named_with_its_figures_and_the_way_on():
    logits = np.random.default_rng(0).normal(size=(2, 3, 50))
    gates = [left_out("one", "why"), same("two", answers(logits), answers(-logits), "fp32")]
    check_open(gates[:1], Path("run/gates.json"))
    with pytest.raises(GateError) as failed:
        check_open(gates, Path("run/gates.json"))
    assert "gate 'two' failed: logits differ by 2 of their spread, of 0.001" in str(failed.value)
    assert "'run/gates.json'" in str(failed.value)
    assert "--skip-gates" in str(failed.value)
    assert "one" not in str(failed.value).split("gate 'two'")[0]
