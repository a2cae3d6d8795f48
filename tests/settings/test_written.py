"""A job as YAML and as Python: files that give the same job again, and leave out what is at its default."""

import dataclasses

import pytest
import yaml

from nemo_minitron.cli.find import find, names
from nemo_minitron.job import Calibration, Data, Distillation, Job, Layout
from nemo_minitron.schema import Unasked, UnaskedRate
from nemo_minitron.settings.written import as_python, as_yaml

JOB = Job("pico", 'it\'s "a" teacher', Data("train", "test"), keep={"layers": [0, 2]}, layout=Layout(tp=2, sp=True))


@pytest.mark.parametrize("job", [JOB, *(find(name) for name in names())], ids=["quotes", *names()])
def test_both_files_give_the_job_again(job, tmp_path):
    for name, text in (("r.yaml", as_yaml(job)), ("r.py", as_python(job))):
        (tmp_path / name).write_text(text)
        assert find(str(tmp_path / name)) == job


def test_only_what_is_not_at_its_default_is_written():
    assert yaml.safe_load(as_yaml(JOB)) == {
        "name": "pico", "teacher": JOB.teacher, "data": {"train": "train", "test": "test"},
        "keep": {"layers": [0, 2]}, "layout": {"tp": 2, "sp": True},
    }  # fmt: skip
    assert "Calibration" not in as_python(JOB)


def test_a_size_that_somebody_asked_for_is_written_though_it_is_the_default(tmp_path):
    """Else it would give way where the file is read."""
    asked = dataclasses.replace(JOB, calibration=Calibration(samples=1024), distillation=Distillation(tokens=5))
    assert yaml.safe_load(as_yaml(asked))["calibration"] == {"samples": 1024}
    derived = dataclasses.replace(
        JOB, distillation=Distillation(sequence_length=Unasked(8), min_learning_rate=UnaskedRate(3e-5))
    )
    assert yaml.safe_load(as_yaml(derived))["distillation"] == {"sequence_length": 8, "min_learning_rate": 3e-5}
    (tmp_path / "r.py").write_text(as_python(derived))
    assert find(str(tmp_path / "r.py")).distillation.sequence_length == 8
