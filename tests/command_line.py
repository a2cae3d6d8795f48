"""The `minitron` command as a process, the pico job that tests run by it, and NeMo alone on what it leaves."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from forked import Forked
from pico import pico_llama, raw_tensors
from words import save_tokenizer

TEXTS = [f"the model number {i} reads {i * 7} words and the next {'word ' * (i % 9)}ends." for i in range(300)]
RECIPE = """
from nemo_minitron.job import *
def recipe():
    return Job(
        name="pico", teacher="teacher", data=Data("corpus.jsonl", "corpus.jsonl"), keep={"ffn": 66, "layers": 5},
        calibration=Calibration(samples=4, sequence_length=36, batch_size=2),
        distillation=Distillation(
            tokens=36 * 2 * 6, sequence_length=36, global_batch_size=2, micro_batch_size=1, learning_rate=1e-3,
            warmup_steps=1, precision="fp32", save_every=2,
        ),
        evaluation=Evaluation(tokens=256, sequence_length=32, precision="fp32", prompts=("the model",), new_tokens=4),
    )
"""


def compressed(folder, **sizes):
    """`folder` with a teacher, a corpus, and `run`: what `minitron compress` makes of them."""
    pico_llama(folder / "teacher", vocab_size=509, **sizes)
    save_tokenizer(folder / "teacher", TEXTS, 509)  # NeMo exports as many rows as the tokenizer has
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (folder / "recipe.py").write_text(RECIPE)
    minitron(folder, "compress", "recipe.py", "--out", "run")
    return folder


def start(folder, *arguments):
    """The command in a forked process, which can be killed with all that it starts, as a group of their own."""
    command = [sys.executable, "-m", "nemo_minitron.cli", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return Forked(command, cwd=folder, start_new_session=True, **pipes)


def minitron(folder, *arguments):
    process = start(folder, *arguments)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output[-4000:]
    return output


def plain(folder, accelerator):
    """`plain_script.py` on the student of `folder`/run: the modules of this package that it needed."""
    training = folder / "run" / "checkpoints" / "distilled"
    checkpoint = training / json.loads((training / "last.json").read_text())["checkpoint"]
    (folder / "questions").mkdir()
    rows = "\n".join(json.dumps({"input": text[:20], "output": text[20:]}) for text in TEXTS[:16])
    for split in ("training", "validation", "test"):
        (folder / "questions" / f"{split}.jsonl").write_text(rows)
    command = [sys.executable, Path(__file__).with_name("plain_script.py"), checkpoint, folder, accelerator]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


def exported_as_is(folder):
    """NeMo's export of the distilled checkpoint has the student's tensors, bit for bit."""
    exported, student = raw_tensors(folder / "exported"), raw_tensors(folder / "run" / "student")
    return exported.keys() == student.keys() and all(np.array_equal(exported[name], student[name]) for name in student)


def moved(folder):
    """Tensor -> the largest change of a weight in the two steps that NeMo took."""
    before, after = (raw_tensors(folder / name) for name in ("exported", "finetuned-hf"))
    return {name: np.abs(after[name].view("f4") - before[name].view("f4")).max() for name in before}


def losses(file):
    return [float(row["loss"]) for row in csv.DictReader(Path(file).open())]
