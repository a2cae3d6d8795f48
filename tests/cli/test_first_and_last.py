"""What a command says first, before it works, and last: what it wrote and what comes next."""

import json
import shlex

import pytest
from pico import pico_llama
from typer.testing import CliRunner
from words import save_tokenizer

from nemo_minitron.cli import app
from nemo_minitron.families import from_hf
from nemo_minitron.search import random_plan

TEXTS = [f"the model number {i} reads {i * 7} words and the next ends." for i in range(40)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("my world")  # a blank, which a copied command must quote
    save_tokenizer(pico_llama(folder / "my model", num_hidden_layers=2), TEXTS, 509)
    random_plan(from_hf(folder / "my model"), keep={"ffn": 64}).save(folder / "plan.json")
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return folder


@pytest.mark.parametrize(
    ("command", "first", "wrote", "then"),
    [
        (
            "prune 'my model' plan.json 'a student'", "cutting my model ...", "a student: ",
            "minitron distill 'a student' --teacher 'my model' --data TEXT --out 'a student-distilled'",
        ),
        (
            "rank-tokens 'my model' --data text.jsonl --out s.safetensors", "counting the tokens of text.jsonl ...",
            "s.safetensors: ", "minitron plan s.safetensors --keep vocab=",
        ),
        (
            "evaluate 'my model' --data text.jsonl --tokens 64 --sequence-length 32 --precision fp32",
            "measuring my model ...", "nothing was written; --json > FILE keeps the numbers", "",
        ),
    ],
)  # fmt: skip
def test_first_and_last(world, monkeypatch, command, first, wrote, then):
    monkeypatch.chdir(world)
    done = CliRunner().invoke(app, shlex.split(command), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == first
    assert any(line.startswith(wrote) for line in lines)
    if then:
        assert lines[-1].startswith(f"next: {then}")
        assert shlex.split(lines[-1])[1] == "minitron"
    assert not [path.name for path in world.iterdir() if path.name.endswith(".work")]
