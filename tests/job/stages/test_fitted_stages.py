"""What a text derives of a job's calibration holds for every stage that reads it; the first of them says it, once."""

from types import SimpleNamespace

import pytest

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.job import Data, Job
from nemo_minitron.job.stages import compensate, compress, corpora

PICO = Architecture(
    num_layers=2, hidden_size=48, ffn_hidden_size=96, num_attention_heads=6, num_query_groups=3, head_dim=8,
    vocab_size=211,
)  # fmt: skip


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """(run, what it says, the calibration of each stage by its name) of a job whose text has 100 tokens."""
    said, calibrations = [], {}
    text = SimpleNamespace(tokens=100, prefix=tmp_path / "text", samples=lambda length: 100 // length)
    scores = SimpleNamespace(save=lambda file: None, samples=1, tokens=99, criterion="l2,mean")
    run = SimpleNamespace(
        job=Job("pico", "teacher", Data("train", "test"), keep={"ffn": 64}), folder=RunFolder(tmp_path),
        open=lambda model: SimpleNamespace(architecture=PICO), say=said.append,
    )  # fmt: skip
    for module in (compress, compensate):
        monkeypatch.setattr(module, "Tokens", lambda prefix: text, raising=False)
    monkeypatch.setattr("nemo_minitron.data.Tokens", lambda prefix: text)
    monkeypatch.setattr(corpora, "prefix", lambda run, split: tmp_path / split)
    monkeypatch.setattr(compress, "calibrate", lambda *given: calibrations.update(estimate=given[3]) or scores)
    monkeypatch.setattr(compress, "describe_scores", lambda scores: [])
    monkeypatch.setattr(compensate, "PrunePlan", SimpleNamespace(load=lambda file: None))
    monkeypatch.setattr(compensate, "Compensation", SimpleNamespace(load=lambda file: SimpleNamespace(tensors={})))
    monkeypatch.setattr(compensate, "leaves_fits", lambda *given: True)
    monkeypatch.setattr(compensate, "solve_for", lambda *given, **more: calibrations.update(compensate=given[3]))
    return run, said, calibrations


def test_a_remark_on_the_text_is_said_once(stages, capsys):
    """Fails where the stage of the compensation says it again, or does not fit its calibration at all."""
    run, said, calibrations = stages
    compress.estimate(run)
    compensate.compensate(run)
    assert calibrations["estimate"] == calibrations["compensate"]
    assert (calibrations["estimate"].sequence_length, calibrations["estimate"].samples) == (99, 1)
    output = capsys.readouterr()
    assert sum("remark:" in line for line in [*said, *output.out.splitlines(), *output.err.splitlines()]) == 1
