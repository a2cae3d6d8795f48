"""The `minitron` command as a process, and the pico recipe that the tests of this folder run."""

import csv
import subprocess
import sys
from pathlib import Path

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


def start(folder, *arguments):
    command = [sys.executable, "-m", "nemo_minitron.cli", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def minitron(folder, *arguments):
    process = start(folder, *arguments)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output[-4000:]
    return output


def losses(file):
    return [float(row["loss"]) for row in csv.DictReader(Path(file).open())]
