"""`minitron convert` refuses what it cannot convert, in one sentence, and leaves nothing behind."""

import json
import subprocess
import sys

import pytest
from pico import SIZES

TEXT = SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
PICTURES = {"architectures": ["Gemma3ForConditionalGeneration"]}


@pytest.mark.parametrize(
    ("config", "model", "out", "words"),
    [
        (TEXT, "model", "out", "neither a checkpoint of NeMo 2 or Megatron-Bridge nor a model that reads pictures"),
        (TEXT, "nowhere", "out", "'nowhere' does not exist; give a checkpoint's folder"),
        (TEXT, "model/config.json", "out", "'model/config.json' is neither a checkpoint"),
        (PICTURES, "model", "out", "has the text_config None; it must be a mapping"),
        (PICTURES, "model", "model", "'model' already exists; give a new folder"),
    ],
)
def test_what_cannot_be_converted_is_refused(config, model, out, words, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "nemo_minitron.cli", "convert", model, out]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
