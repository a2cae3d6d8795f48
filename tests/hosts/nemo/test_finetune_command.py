"""`minitron finetune`: NeMo's instruction tuning of a student, its loss on the answers alone."""

import csv
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from forked import Forked
from pico import pico_llama, raw_tensors
from tolerances import LOSS_LAYOUT_FP32
from words import save_tokenizer

from nemo_minitron.commands.finetune import check_rows
from nemo_minitron.errors import InputError
from nemo_minitron.job import Layout
from nemo_minitron.settings.finetuning import Finetuning

PROMPT, ANSWER = "the model number 7 reads 49 words", "and the next word word word ends."
TEXTS = [f"{PROMPT} {ANSWER}", *(f"the model reads {i} words {'word ' * (i % 9)}ends." for i in range(60))]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Rows that are all alike, so that any batch of them has one loss; a head of large weights, so that the losses of
    prompt and answer are far apart."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("finetune")
    file = pico_llama(folder / "student") / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] * 8}, file, metadata={"format": "pt"})
    save_tokenizer(folder / "student", TEXTS, 509)
    (folder / "rows.jsonl").write_text("\n".join([json.dumps({"input": PROMPT, "output": ANSWER})] * 6))
    return folder


COMMAND = (
    "-m nemo_minitron.cli finetune student --data rows.jsonl --out out --steps 300 --sequence-length 32 "
    "--global-batch-size 4 --micro-batch-size 2 --precision fp32 --learning-rate 0.001"
)


def finetune(folder):
    command = [sys.executable, *COMMAND.split()]
    return Forked(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rows(file):
    return list(csv.DictReader(file.open())) if file.exists() else []


def loss_of_the_answer(folder):
    """The loss, in float64, of the answer's tokens and the EOS behind it, given all tokens before them."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (PROMPT, f" {ANSWER}"))
    ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
    logits = LlamaForCausalLM.from_pretrained(folder).double()(ids).logits[0, :-1]
    nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    assert len(ids[0]) <= 32
    return nats[len(prompt) - 1 :].mean().item(), nats.mean().item()


@pytest.mark.slow
def test_a_student_is_aligned_and_stays_a_plain_folder(world):
    """The training is told to stop, saves a checkpoint, and the second run resumes. Without that checkpoint only the
    last step would be saved, and the second run would write all rows again."""
    first, losses = finetune(world), world / ".out.work" / "training" / "loss.csv"
    deadline = time.monotonic() + 300
    while len(rows(losses)) < 3 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    first.terminate()
    output = first.communicate(timeout=120)[0]
    assert (first.returncode, "told to stop, saved" in output) == (143, True), output[-3000:]
    before = rows(losses)
    assert 3 <= len(before) < 300
    done = finetune(world)
    output = done.communicate(timeout=600)[0]
    assert done.returncode == 0, output[-3000:]
    found = rows(world / "out" / "loss.csv")
    assert [int(row["step"]) for row in found] == list(range(1, 301))
    assert found[: len(before)] == before
    answers, whole = loss_of_the_answer(world / "student")
    assert float(found[0]["loss"]) == pytest.approx(answers, rel=LOSS_LAYOUT_FP32)
    assert abs(whole / answers - 1) > 100 * LOSS_LAYOUT_FP32  # else the mask would not show
    before, after = raw_tensors(world / "student"), raw_tensors(world / "out")
    assert before.keys() == after.keys()
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    assert loss_of_the_answer(world / "out")[0] < answers
    assert not (world / ".out.work").exists()
    made = (world / "out" / "config.json").stat().st_ino
    again = finetune(world)  # finds the student, and starts nothing
    assert "was made by the same training before" in again.communicate(timeout=120)[0]
    assert again.returncode == 0
    assert (world / "out" / "config.json").stat().st_ino == made


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no prompt"),
        ('{"input": "a", "output": "b"}\n{"input": "a"}', "line 2 lacks a text 'input' or 'output'"),
        ('{"input": "a", "output": 3}', "line 1 lacks"),
        ("[1]", "line 1 lacks"),
        ("\n{", "line 2 is not JSON"),
    ],
)
def test_rows_that_are_none(tmp_path, text, words):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(InputError, match=words):
        check_rows(tmp_path / "rows.jsonl")


def test_settings_that_are_refused():
    with pytest.raises(InputError, match=r"prompt_template '\{output\} \{input\}' must hold"):
        Finetuning(prompt_template="{output} {input}")
    settings = Finetuning(steps=7, global_batch_size=3, warmup_steps=2)
    assert (settings.training().steps, settings.training().warmup) == (7, 2)
    with pytest.raises(InputError, match="the nearest legal size is 4"):
        settings.training().check_batch(Layout(dp=4))
