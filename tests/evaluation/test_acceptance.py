"""A student as its teacher's draft: acceptance against float64, and what servers are started with."""

import json
import shlex
import subprocess

import numpy as np
import pytest
from pico import pico_llama
from tolerances import ACCEPTANCE_FP32
from typer.testing import CliRunner
from words import save_tokenizer

from nemo_minitron.cli import app
from nemo_minitron.errors import InputError
from nemo_minitron.evaluation import Acceptance, draft_acceptance
from nemo_minitron.export import write_draft

VOCAB = 509


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model and its first five layers; a head of large weights, so that they agree neither always nor never."""
    folder = tmp_path_factory.mktemp("pair")
    target = pico_llama(folder / "target")
    draft = pico_llama(folder / "draft", num_hidden_layers=5)
    from safetensors.numpy import load_file, save_file

    head = load_file(target / "model.safetensors")["lm_head.weight"] * 3
    for model in (target, draft):
        tensors = load_file(model / "model.safetensors") | {"lm_head.weight": head}
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return target, draft


def probabilities(folder, windows):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).double()
    with torch.no_grad():
        return model(torch.from_numpy(windows)).logits.softmax(-1).numpy()


def test_acceptance_equals_float64(pair, monkeypatch):
    monkeypatch.setattr("nemo_minitron.evaluation.acceptance.POSITIONS", 7)
    windows = np.random.default_rng(5).integers(0, VOCAB, (5, 13))
    p, q = (probabilities(folder, windows) for folder in pair)
    expected = np.minimum(p, q).sum(-1).mean()
    assert 0.2 < expected < 0.9  # else a sum of something else might look like it
    told = []
    say = lambda done, total: told.append((done, total))  # noqa: E731
    found = draft_acceptance(*pair, windows, precision="fp32", batch_size=2, progress=say)
    assert told == [(2, 5), (4, 5), (5, 5)]
    assert found.acceptance == pytest.approx(expected, rel=ACCEPTANCE_FP32)
    assert found.acceptance == pytest.approx(1 - np.abs(p - q).sum(-1).mean() / 2, rel=ACCEPTANCE_FP32)
    assert found.greedy == (p.argmax(-1) == q.argmax(-1)).mean()
    assert found.positions == 65
    at_once = draft_acceptance(*pair, windows, precision="fp32", batch_size=5)
    assert at_once.acceptance == pytest.approx(found.acceptance, rel=ACCEPTANCE_FP32)
    same = draft_acceptance(pair[0], pair[0], windows, precision="fp32")
    assert (same.acceptance, same.greedy, same.cost) == (pytest.approx(1.0, rel=ACCEPTANCE_FP32), 1.0, 1.0)


def test_the_drafts_length_by_hand():
    half = Acceptance(0.8, 0.9, 100, 0.5)
    assert half.gain(0) == 1
    assert half.gain(2) == pytest.approx((1 + 0.8 + 0.64) / 2)
    assert half.length == 2  # 1.2 with one, 1.22 with two, 1.18 with three
    assert Acceptance(0.5, 0.9, 100, 0.6).length == 0  # 1.5 tokens at 1.6 times the cost
    assert Acceptance(0.9, 0.9, 100, 0.01).length == 16
    assert half.as_dict()["gain"] == half.gain(2)


def test_the_pair_is_what_servers_take(pair, tmp_path):
    import yaml

    commands = write_draft(tmp_path / "a folder", *pair, 3)
    held = json.loads((tmp_path / "a folder" / "vllm.json").read_text())
    assert held == {"method": "draft_model", "model": str(pair[1]), "num_speculative_tokens": 3}
    assert yaml.safe_load((tmp_path / "a folder" / "tensorrt_llm.yaml").read_text()) == {
        "disable_overlap_scheduler": True,
        "speculative_config": {
            "decoding_type": "DraftTarget", "max_draft_len": 3, "speculative_model_dir": str(pair[1]),
        },
    }  # fmt: skip
    for command in commands:
        words = subprocess.run(["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True).stdout
        assert words.splitlines()[1 if command.startswith("trt") else 2] == str(pair[0])
    assert shlex.split(commands[1])[-1] == str(tmp_path / "a folder" / "tensorrt_llm.yaml")


def test_models_of_two_vocabularies_are_no_pair(pair, tmp_path):
    other = pico_llama(tmp_path / "other", vocab_size=512)
    with pytest.raises(InputError, match="the target has 509 tokens in its vocabulary, the draft 512"):
        draft_acceptance(pair[0], other, np.zeros((1, 4), int))
    with pytest.raises(InputError, match="the target has 509 tokens in its vocabulary, the draft 512"):
        write_draft(tmp_path / "out", pair[0], other, 3)
    with pytest.raises(InputError, match="the nearest legal number is 1"):
        write_draft(tmp_path / "out", *pair, 0)
    assert not (tmp_path / "out").exists()


def test_the_command_tells_acceptance_and_writes_the_pair(pair, tmp_path, monkeypatch):
    texts = [f"the model reads {'word ' * i}{i}" for i in range(40)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for folder in pair:
        save_tokenizer(folder, texts, VOCAB)
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", str(pair[1]), "--data", "corpus.jsonl", "--precision", "fp32", "--json"]
    options = ["--draft-of", str(pair[0]), "--draft-out", "served", "--tokens", "96", "--sequence-length", "24"]
    done = CliRunner().invoke(app, [*command, *options])
    assert done.exit_code == 0, done.output
    draft = json.loads(done.output.splitlines()[-1])["draft"]
    assert draft["positions"] == 96
    assert 0 < draft["acceptance"] < 1
    held = json.loads((tmp_path / "served" / "vllm.json").read_text())
    assert held["num_speculative_tokens"] == max(1, draft["length"])
    alone = ["evaluate", str(pair[1]), "--data", "corpus.jsonl", "--draft-out", "served"]
    blind = ["evaluate", str(pair[1]), "--tasks", "none", "--draft-of", str(pair[0])]
    early = ["evaluate", str(pair[1]), "--data", "corpus.jsonl", "--draft-of"]
    over = [*early, str(pair[0]), "--draft-out", "corpus.jsonl"]
    other = [*early, str(pico_llama(tmp_path / "other", vocab_size=512))]
    refusals = [(alone, "give --draft-of"), (blind, "give --data"), (over, "is a file"), (other, "has 512 tokens")]
    refusals.append(([*early, "no-model"], "'no-model' does not exist"))
    for refused, words in refusals:
        with pytest.raises(InputError, match=words):
            CliRunner().invoke(app, refused, catch_exceptions=False)
