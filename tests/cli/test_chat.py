"""`minitron chat` over a pipe: what it says is what transformers generates, with the conversation before it."""

import subprocess
import sys

import pytest
from pico import pico_llama
from typer.testing import CliRunner
from words import save_tokenizer

from nemo_minitron.cli import app
from nemo_minitron.errors import InputError

TEXTS = [f"the model number {i} reads {i * 7} words and the next ends." for i in range(60)]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}model{% endif %}"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """`plain` without a chat template; `small` and `big` with one."""
    import json

    folder = tmp_path_factory.mktemp("chat")
    for name, seed in (("plain", 0), ("small", 0), ("big", 1)):
        pico_llama(folder / name, num_hidden_layers=2, seed=seed)
        save_tokenizer(folder / name, TEXTS, 509)
        if name != "plain":
            file = folder / name / "tokenizer_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return folder


def chat(world, text, *arguments):
    command = [sys.executable, "-m", "nemo_minitron.cli", "chat", *arguments, "--precision", "fp32"]
    return subprocess.run(command, cwd=world, input=text, capture_output=True, text=True, timeout=300)


def continued(folder, prompt, new):
    """What transformers writes after a prompt, greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
        )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_a_conversation_side_by_side(world):
    """Each model sees its own answers. The second answer needs the first one."""
    done = chat(world, "the words\n\nthe next\n", "small", "--beside", "big", "--new-tokens", "5")
    assert done.returncode == 0, done.stderr
    said, asked = {"student": "small", "beside": "big"}, ["the words", "the next"]
    wanted, before = [], dict.fromkeys(said, "")
    for text in asked:
        for name, folder in said.items():
            before[name] += f"user {text} "
            answer = continued(world / folder, f"{before[name]}model", 5)
            before[name] += f"assistant {answer} "
            wanted.append(f"[{name}] {answer}")
    assert done.stdout.strip() == "\n".join(wanted).strip()
    assert "loading small and big" in done.stderr


def test_a_model_without_a_template_continues(world):
    done = chat(world, "the model", "plain", "--new-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert "'plain' has no chat template: it continues each line" in done.stderr
    assert done.stdout.rstrip("\n") == continued(world / "plain", "the model", 4).rstrip("\n")


def test_an_old_message_is_forgotten_when_there_is_no_room(world):
    from nemo_minitron.evaluation.chat import Speaker

    speaker = Speaker(world / "small", new_tokens=20, system="be brief", precision="fp32")
    parts = []
    for _ in range(12):
        parts.append(speaker.answer("the model reads words and the next ends.", lambda text: None))
        assert speaker._ids(speaker.messages, "").shape[1] <= speaker.positions + 20
    assert speaker.messages[0] == {"role": "system", "content": "be brief"}
    assert speaker.messages[1]["role"] == "user"
    assert 3 <= len(speaker.messages) < 1 + 2 * 12
    assert speaker.messages[-1]["content"] == parts[-1]


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("", ("plain",), "no message came"),
        ("x", ("plain", "--new-tokens", "0"), "new_tokens is 0"),
        ("x", ("plain", "--temperature", "-1"), "temperature is -1.0; it must be 0 or more"),
        ("the " * 300, ("plain", "--new-tokens", "4"), "the message has"),
    ],
)
def test_refused(world, monkeypatch, text, arguments, words):
    monkeypatch.chdir(world)
    done = CliRunner().invoke(app, ["chat", *arguments, "--precision", "fp32"], input=text)
    assert isinstance(done.exception, InputError), done.output
    assert words in str(done.exception)


def test_a_refusal_has_exit_code_2(world):
    done = chat(world, "x", "nowhere")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert "nowhere" in done.stderr
