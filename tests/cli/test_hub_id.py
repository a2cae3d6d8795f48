"""A hub id as MODEL: what lies in Hugging Face's cache is found without a network, anything else is one sentence."""

import os
import shutil
import subprocess
import sys

from pico import pico_llama

from nemo_minitron.families import from_hf
from nemo_minitron.search import random_plan


def _prune(folder, model, out):
    command = [sys.executable, "-m", "nemo_minitron.cli", "prune", model, str(folder / "plan.json"), str(folder / out)]
    environment = os.environ | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_a_hub_id_is_read_from_the_cache(tmp_path):
    """The cache's own layout: refs/main names a snapshot, whose files are links to blobs."""
    repository = tmp_path / "home" / "hub" / "models--somebody--pico"
    pico_llama(tmp_path / "model")
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in (tmp_path / "model").iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    random_plan(from_hf(tmp_path / "model"), keep={"ffn": 10}).save(tmp_path / "plan.json")

    done = _prune(tmp_path, "somebody/pico", "student")
    assert done.returncode == 0, done.stderr
    assert from_hf(tmp_path / "student").ffn_hidden_size == 10
    assert not (tmp_path / "student" / "model.safetensors").is_symlink()

    done = _prune(tmp_path, "somebody/else", "other")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "'somebody/else' is neither a folder here nor a model that the hub or its cache gives" in done.stderr
    assert not (tmp_path / "other").exists()
