"""What is half done on one host: a training is refused on the other, statistics are gathered anew."""

import json
from types import SimpleNamespace

import pytest
from pico import pico_llama

from nemo_minitron.artifacts.files import write_json
from nemo_minitron.artifacts.run_folder import TrainingFolder
from nemo_minitron.commands import estimate, same_host
from nemo_minitron.errors import InputError
from nemo_minitron.pruning import HFSource
from nemo_minitron.settings.calibration import Calibration
from nemo_minitron.settings.host import HOST
from nemo_minitron.settings.layout import Layout


def begin(training, host, monkeypatch):
    monkeypatch.setattr(same_host, "host_name", lambda: host)
    same_host.begin_on_this_host(training)
    write_json(TrainingFolder(training).settings, "0" * 64)


def test_a_training_goes_on_where_it_began(tmp_path, monkeypatch):
    begin(tmp_path / "t", "bridge", monkeypatch)
    begin(tmp_path / "t", "bridge", monkeypatch)
    before = {file: file.read_bytes() for file in (tmp_path / "t").iterdir()}
    with pytest.raises(InputError, match=r"begun on the host 'bridge', and 'nemo' cannot .*; give --host bridge, or "):
        begin(tmp_path / "t", "nemo", monkeypatch)
    assert {file: file.read_bytes() for file in (tmp_path / "t").iterdir()} == before


def test_a_training_of_an_earlier_version_was_nemos(tmp_path, monkeypatch):
    begin(tmp_path / "t", "nemo", monkeypatch)
    TrainingFolder(tmp_path / "t").host.unlink()
    with pytest.raises(InputError, match="begun on the host 'nemo'"):
        begin(tmp_path / "t", "bridge", monkeypatch)
    begin(tmp_path / "t", "nemo", monkeypatch)


def test_the_marks_of_statistics_name_the_host(tmp_path, monkeypatch):
    source = HFSource(pico_llama(tmp_path / "model"))
    monkeypatch.setattr(estimate, "data_digest", lambda tokens: "the text")
    marks = []
    for host in ("nemo", "nemo", "bridge"):
        monkeypatch.setenv(HOST, host)
        estimate.calibrate(source, SimpleNamespace(), tmp_path, Calibration(method="magnitude"), Layout())
        marks.append(json.loads((tmp_path / "marks.json").read_text()))
    assert marks[0] == marks[1]
    assert all(marks[0][name] != marks[2][name] for name in marks[0])
