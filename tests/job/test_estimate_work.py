"""What an interrupted estimate has left: damaged files are made again, not tripped over for ever."""

import pytest
from pico import pico_llama

from nemo_minitron.artifacts import Scores
from nemo_minitron.commands.estimate import _forget_others
from nemo_minitron.families import from_hf
from nemo_minitron.importance.alternatives import random_scores
from nemo_minitron.settings.calibration import STATISTICS, Calibration


@pytest.fixture
def work(tmp_path):
    pico_llama(tmp_path / "teacher")
    scores = random_scores(from_hf(tmp_path / "teacher"), 0)
    _forget_others(tmp_path, Calibration().marks("a"))
    scores.save(tmp_path / STATISTICS)
    return tmp_path


def test_what_is_whole_stays(work):
    _forget_others(work, Calibration().marks("a"))
    Scores.load(work / STATISTICS)


@pytest.mark.parametrize(
    ("name", "text"), [(STATISTICS, b""), (STATISTICS, b"half"), ("marks.json", b""), ("marks.json", b"[]")]
)
def test_what_is_damaged_goes(work, name, text):
    (work / name).write_bytes(text)
    _forget_others(work, Calibration().marks("a"))
    assert not (work / STATISTICS).exists()
