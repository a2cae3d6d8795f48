"""What a model's family will refuse is refused before any text is tokenised, by every command, and leaves nothing."""

import json

import numpy as np
import pytest
from pico import SIZES, pico_llama
from safetensors.numpy import save_file
from typer.testing import CliRunner
from words import save_tokenizer

from nemo_minitron.cli import app
from nemo_minitron.errors import InputError
from nemo_minitron.families import family_of, from_hf
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
    save_tokenizer(pico_llama(folder / "other", num_hidden_layers=2), [text[::-1] for text in TEXTS], 509)
    yarn = {"rope_type": "yarn", "factor": 4.0}
    for name, fields in {"yarn-4": {"rope_scaling": yarn}, "yarn-5": {"rope_parameters": yarn}}.items():
        (folder / name).mkdir()
        for file in (folder / "good").iterdir():
            (folder / name / file.name).symlink_to(file)
        config = json.loads((folder / "good" / "config.json").read_text()) | fields
        (folder / name / "config.json").unlink()
        (folder / name / "config.json").write_text(json.dumps(config))
    write_hybrid(folder / "hybrid", folder / "good")
    random_plan(from_hf(folder / "good"), keep={"ffn": 64}).save(folder / "plan.json")
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps({"input": text, "output": text}) for text in TEXTS))
    (folder / "recipe.py").write_text(RECIPE)
    return folder


def write_hybrid(folder, good):
    """Zeros as a Nemotron-H, which transformers 4 cannot write; the other files are those of `good`."""
    left_out = ("rms_norm_eps", "rope_theta", "num_hidden_layers")
    config = {name: value for name, value in SIZES.items() if name not in left_out} | {"model_type": "nemotron_h"}
    config |= {"mamba_num_heads": 8, "mamba_head_dim": 6, "n_groups": 2, "ssm_state_size": 5}
    config |= {"architectures": ["NemotronHForCausalLM"], "hybrid_override_pattern": "M-*M"}
    architecture = from_hf(config)
    shapes, zeros = architecture.shapes(), {}
    for name, parts in family_of(config).hf_tensors(architecture).items():
        rows = sum(shapes[part][0] for part in parts)
        zeros[name] = np.zeros((rows, *shapes[parts[0]][1:]), np.float32)
    folder.mkdir()
    save_file(zeros, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    for file in good.glob("*token*"):
        (folder / file.name).symlink_to(file)


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


ON_NEMO = {name: (command, "give --host bridge") for name, command in COMMANDS.items() if name != "distill from"} | {
    "evaluate": ("evaluate {model} --data text.jsonl", "has no 'nemotron_h'; transformers 5 has it"),
    "evaluate a draft": ("evaluate good --data text.jsonl --draft-of {model}", "has no 'nemotron_h'"),
    "chat": ("chat {model}", "has no 'nemotron_h'"),
    "chat beside": ("chat good --beside {model}", "has no 'nemotron_h'"),
}


@pytest.mark.parametrize(("command", "words"), ON_NEMO.values(), ids=ON_NEMO)
def test_a_hybrid_on_nemo(world, monkeypatch, command, words):
    assert words in refused(world, monkeypatch, command.format(model="hybrid"))


def test_what_is_not_proven_for_a_hybrid(world, monkeypatch):
    monkeypatch.setenv("MINITRON_HOST", "bridge")
    monkeypatch.setattr("nemo_minitron.hosts.host_name", lambda: "bridge")  # it may not be installed
    said = refused(world, monkeypatch, "rank-tokens hybrid --data text.jsonl --out out.safetensors")
    legal = "legal are rotate, estimate, plan, compensate, "
    assert said.startswith(f"rank-tokens is not supported for a hybrid with Mamba; {legal}")


def test_fp8_and_virtual_stages_of_a_hybrid(world, monkeypatch):
    monkeypatch.setenv("MINITRON_HOST", "bridge")
    monkeypatch.setattr("nemo_minitron.hosts.host_name", lambda: "bridge")  # it may not be installed
    for name in ("estimate", "cache-logits", "distill", "distill from", "finetune"):
        command = COMMANDS[name].format(model="hybrid")
        option = "--teacher-precision" if name == "distill from" else "--precision"
        said = refused(world, monkeypatch, f"{command} {option} fp8-current")
        assert said == "fp8-current is not supported for a hybrid with Mamba; legal are bf16 and fp32", name
        if name == "distill from":  # the student's two layers are no four stages
            continue
        said = refused(world, monkeypatch, f"{command} --pp 2 --vp 2")
        assert said == "vp=2 is not possible in a hybrid with Mamba; the nearest legal vp is 1", name


def test_sizes_that_fp8_cannot_multiply(world, monkeypatch):
    """48 hidden channels and 96 neurons divide by 16; 3 query groups of 8 channels do not."""
    for name in ("estimate", "compensate", "cache-logits", "distill", "finetune"):
        said = refused(world, monkeypatch, COMMANDS[name].format(model="good") + " --precision fp8-current")
        assert "query_groups=3 is not legal in fp8-current at tp=1" in said, name


def test_a_pair_without_one_vocabulary(world, monkeypatch):
    said = refused(world, monkeypatch, COMMANDS["distill from"].format(model="small"))
    assert "the teacher has 480 tokens in its vocabulary and the student has 509" in said
    for command in (COMMANDS["distill from"], "evaluate good --data text.jsonl --draft-of {model}"):
        said = refused(world, monkeypatch, command.format(model="other"))
        assert "both have 509 tokens in their vocabularies, but token 259 is" in said, command
    said = refused(world, monkeypatch, COMMANDS["compress, learning from"].format(model="other"))
    assert "the student and 'other' both have 509 tokens in their vocabularies, but token 259 is" in said


TEXT_READERS = {
    **{name: COMMANDS[name] for name in ("estimate", "compensate", "cache-logits", "distill")},
    "evaluate": "evaluate {model} --data text.jsonl",
    "rank-tokens": "rank-tokens {model} --data text.jsonl --out out.safetensors",
    "distill, held out": COMMANDS["distill"].replace("text.jsonl", "pairs.jsonl") + " --validation text.jsonl",
    "compress": "compress recipe.py data.train=text.jsonl --out out",
    "compress a model": "compress ./{model} --data text.jsonl --params 0.8x --out out",
}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("missing.jsonl", "'missing.jsonl' does not exist"),
        ("plan.json", "'plan.json' is not a file of text: legal are"),
    ],
)
@pytest.mark.parametrize("command", TEXT_READERS.values(), ids=TEXT_READERS)
def test_a_text_that_is_missing_or_none_is_refused_before_anything_begins(world, monkeypatch, command, text, words):
    """Before a tokenizer is loaded, whose import alone takes many seconds."""
    monkeypatch.setattr("nemo_minitron.data.load_tokenizer", None)
    said = refused(world, monkeypatch, command.format(model="good").replace("text.jsonl", text))
    assert words in said
