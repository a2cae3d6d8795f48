"""A distilled student in NeMo alone, on a GPU with Transformer Engine: nothing of this package is imported."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pico import pico_llama, raw_tensors
from words import save_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: run it with make test-gpu on one")
SCRIPT = Path(__file__).parents[1] / "cli" / "plain_script.py"
TEXTS = [f"the model number {i} reads {i * 7} words and the next {'word ' * (i % 9)}ends." for i in range(300)]
RECIPE = """
from nemo_minitron.job import *
def recipe():
    return Job(
        name="pico", teacher="teacher", data=Data("corpus.jsonl", "corpus.jsonl"), keep={"ffn": 128, "layers": 5},
        calibration=Calibration(samples=4, sequence_length=32, batch_size=2),
        distillation=Distillation(
            tokens=32 * 2 * 4, sequence_length=32, global_batch_size=2, micro_batch_size=1, learning_rate=1e-3,
            warmup_steps=1, precision="fp32",
        ),
        evaluation=Evaluation(tokens=256, sequence_length=32, precision="fp32"),
    )
"""
SIZES = {
    "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
}  # fmt: skip


def test_nemo_alone_exports_and_trains_a_student(tmp_path):
    pytest.importorskip("transformer_engine")
    save_tokenizer(pico_llama(tmp_path / "teacher", vocab_size=509, **SIZES), TEXTS, 509)
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (tmp_path / "recipe.py").write_text(RECIPE)
    (tmp_path / "questions").mkdir()
    rows = "\n".join(json.dumps({"input": text[:20], "output": text[20:]}) for text in TEXTS[:16])
    for split in ("training", "validation", "test"):
        (tmp_path / "questions" / f"{split}.jsonl").write_text(rows)
    compress = [sys.executable, "-m", "nemo_minitron.cli", "compress", "recipe.py", "--out", "run"]
    subprocess.run(compress, cwd=tmp_path, check=True, timeout=600)
    distilled = tmp_path / "run" / "checkpoints" / "distilled"
    checkpoint = distilled / json.loads((distilled / "last.json").read_text())["checkpoint"]
    command = [sys.executable, str(SCRIPT), str(checkpoint), str(tmp_path), "gpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert json.loads(line.removeprefix("RESULT")) == []
    exported, student = raw_tensors(tmp_path / "exported"), raw_tensors(tmp_path / "run" / "student")
    assert [name for name in student if not np.array_equal(exported[name], student[name])] == []
    after = raw_tensors(tmp_path / "finetuned-hf")
    moved = {name: np.abs(after[name].view("f4") - exported[name].view("f4")).max() for name in exported}
    assert {name: by for name, by in moved.items() if not 0 < by < 1e-3} == {}
