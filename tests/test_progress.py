"""Lines of progress: rate, time left, how often."""

import pytest

from nemo_minitron import progress
from nemo_minitron.progress import SECONDS, Progress, SoFar


@pytest.fixture
def clock(monkeypatch):
    """The seconds of the clock, as a list of one number."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_has_rate_and_time_left(clock):
    lines = []
    shown = Progress("evaluate: window", "tokens", 512, lines.append)
    clock[0] += SECONDS - 1
    shown(3, 40)  # too early
    clock[0] += 1
    shown(4, 40)
    clock[0] += 1
    shown(5, 40)  # too soon after the last line
    assert lines == ["> evaluate: window 4/40  205 tokens/s  90 s left"]


def test_what_was_done_before_does_not_count(clock):
    lines = []
    shown = Progress("generate: document", say=lines.append)
    shown.begin(30)
    clock[0] += SECONDS
    shown(30, 40)  # nothing yet
    shown(35, 40)
    assert lines == ["> generate: document 35/40  0 steps/s  10 s left"]


def test_work_without_a_known_end(clock):
    lines = []
    shown = SoFar("tokenise:", "tokens", lines.append)
    shown(5)  # too early
    clock[0] += SECONDS
    shown(1_200_000)
    shown(1_300_000)  # too soon after the last line
    assert lines == ["> tokenise: 1,200,000 tokens  120,000 tokens/s"]
