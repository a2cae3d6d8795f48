"""What a model's family will refuse is refused before any text is tokenised, by every command, and leaves nothing."""

import json

import pytest
from pico import pico_llama
from typer.testing import CliRunner
from words import save_tokenizer

from nemo_minitron.cli import app
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.search import random_plan

TEXTS = [f"the model number {i} reads {i * 7} words and the next ends." for i in range(40)]
COMMANDS = {
    "estimate": "estimate {model} --data text.jsonl --samples 2 --sequence-length 16 --out out.safetensors",
    "compensate": "compensate {model} plan.json --data text.jsonl --samples 2 --sequence-length 16 --out o.safetensors",
    "cache-logits": "cache-logits {model} --data text.jsonl --sequence-length 16 --out out",
    "distill": "distill {model} --teacher good --data text.jsonl --tokens 64 --sequence-length 16 --out out",
    "distill from": "distill good --teacher {model} --data text.jsonl --tokens 64 --sequence-length 16 --out out",
    "finetune": "finetune {model} --data pairs.jsonl --out out",
    "compress": "compress recipe.py teacher={model} --out out",
    "compress, learning from": "compress recipe.py learns_from={model} --dry-run --out out",
    "compress --dry-run": "compress recipe.py teacher={model} --dry-run --out out",
}
RECIPE = """
from nemo_minitron.job import *
def recipe():
    return Job(name="x", teacher="good", data=Data("text.jsonl", "text.jsonl"), keep={"ffn": 64},
               calibration=Calibration(samples=2, sequence_length=16))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """`good`, and models of the same weights that NeMo's class cannot be; a plan, texts, a recipe."""
    folder = tmp_path_factory.mktemp("world")
    save_tokenizer(pico_llama(folder / "good", num_hidden_layers=2), TEXTS, 509)
    save_tokenizer(pico_llama(folder / "small", num_hidden_layers=2, vocab_size=480), TEXTS, 480)
    yarn = {"rope_type": "yarn", "factor": 4.0}
    for name, fields in {"yarn-4": {"rope_scaling": yarn}, "yarn-5": {"rope_parameters": yarn}}.items():
        (folder / name).mkdir()
        for file in (folder / "good").iterdir():
            (folder / name / file.name).symlink_to(file)
        config = json.loads((folder / "good" / "config.json").read_text()) | fields
        (folder / name / "config.json").unlink()
        (folder / name / "config.json").write_text(json.dumps(config))
    random_plan(from_hf(folder / "good"), keep={"ffn": 64}).save(folder / "plan.json")
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps({"input": text, "output": text}) for text in TEXTS))
    (folder / "recipe.py").write_text(RECIPE)
    return folder


def refused(world, monkeypatch, command):
    monkeypatch.chdir(world)
    before = {path.name for path in world.iterdir()}
    result = CliRunner().invoke(app, command.split())
    assert {path.name for path in world.iterdir()} == before, "something was left behind"
    assert isinstance(result.exception, InputError), result.output
    return str(result.exception)


@pytest.mark.parametrize("model", ["yarn-4", "yarn-5"])
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_rotary_scaling_that_nemo_lacks(world, monkeypatch, command, model):
    assert "rope_scaling 'yarn' is not supported by NeMo's LlamaModel" in refused(
        world, monkeypatch, command.format(model=model)
    )


def test_a_pair_without_one_vocabulary(world, monkeypatch):
    said = refused(world, monkeypatch, COMMANDS["distill from"].format(model="small"))
    assert "the teacher has 480 tokens in its vocabulary and the student has 509" in said


def test_a_refusal_of_the_text_leaves_no_hidden_folder(world, monkeypatch):
    command = COMMANDS["estimate"].format(model="good").replace("text.jsonl", "missing.jsonl")
    assert "missing.jsonl' does not exist" in refused(world, monkeypatch, command)
