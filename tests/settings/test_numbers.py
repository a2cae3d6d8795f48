"""Whole numbers as people write them, on the command line, in overrides and in recipe files."""

import pytest
from typer.testing import CliRunner

from nemo_minitron.cli import app
from nemo_minitron.errors import InputError
from nemo_minitron.job import Data, Job
from nemo_minitron.settings.numbers import whole_number

WRITTEN = {"60k": 60_000, "1.5M": 1_500_000, "1e9": 10**9, "2.5e3": 2500, "10_240": 10_240, "84B": 84 * 10**9, "7": 7}
NONE = ("", "x", "1.5", "1e-4", "1_0", "60kk", "k", "1e999", "0x10", "٣k", "--3")


@pytest.mark.parametrize(("text", "number"), WRITTEN.items())
def test_written(text, number):
    assert whole_number(text) == number
    assert whole_number(f"-{text}") == -number
    job = Job("pico", "teacher", Data("train", "test"))
    assert job.override([f"distillation.tokens={text}"]).distillation.tokens == number
    assert Job.from_dict({"name": "p", "teacher": "t", "data": {"train": "a", "test": "b"}, "keep": {"ffn": number}})


@pytest.mark.parametrize("text", NONE)
def test_not_written(text):
    assert whole_number(text) is None
    with pytest.raises(InputError, match=r"distillation\.tokens"):
        Job("pico", "teacher", Data("train", "test")).override([f"distillation.tokens={text}"])


def test_an_option_says_how_to_write_one():
    done = CliRunner().invoke(app, ["distill", "student", "--data", "d", "--out", "o", "--tokens", "3x"])
    assert done.exit_code == 2
    output = " ".join(done.output.replace("│", " ").split())
    assert "'3x' is not a valid integer; write for example 60000, 60k, 1e9 or 10_240" in output
