"""Checkpoints that move between the hosts: `minitron prune` on each host cuts the other's, into one of its own.

NeMo runs in its own environment, `.venv` beside this one.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pico import pico_llama
from ranks import run_ranks
from words import save_tokenizer

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.commands.prune import run_prune
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.pruning import prune
from nemo_minitron.pruning.convert import convert
from nemo_minitron.search import random_plan
from nemo_minitron.sources.bridge_config import is_bridge_checkpoint
from nemo_minitron.sources.folder import HFSource
from nemo_minitron.sources.tensors import whole

ROOT = Path(__file__).parents[3]
NEMO = ROOT / ".venv" / "bin" / "python"
WORKER = Path(__file__).parent / "checkpoint_worker.py"
KEEPS = [{"ffn": 48, "layers": 5}, {"hidden": 40, "heads": 4}]  # of the first cut, on NeMo, and of the second
pytestmark = [
    pytest.mark.slow, pytest.mark.bridge,
    pytest.mark.skipif(not NEMO.exists(), reason="NeMo's environment is not there (make venv)"),
]  # fmt: skip


def minitron(python, folder, *words):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [str(python), "-m", "nemo_minitron", *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """`bridge`: a checkpoint of Bridge. `nemo`: what NeMo cuts of it. `again`: what Bridge cuts of that. `cut-1` and
    `cut-2` are the folders of the same cuts."""
    folder = tmp_path_factory.mktemp("hosts")
    teacher = pico_llama(folder / "teacher", num_attention_heads=6, num_key_value_heads=2)
    save_tokenizer(teacher, ["the model reads words"], from_hf(teacher).vocab_size)
    run_ranks(1, WORKER, teacher, folder / "bridge")
    before = teacher
    for count, keep in enumerate(KEEPS, 1):
        random_plan(from_hf(before), keep=keep).save(folder / f"plan-{count}.json")
        before = prune(before, PrunePlan.load(folder / f"plan-{count}.json"), folder / f"cut-{count}")
    minitron(NEMO, folder, "prune", "bridge", "plan-1.json", "nemo")
    minitron(sys.executable, folder, "prune", "nemo", "plan-2.json", "again")
    return folder


@pytest.mark.parametrize(("checkpoint", "cut"), [("bridge", "teacher"), ("nemo", "cut-1"), ("again", "cut-2")])
def test_each_host_cuts_the_others_checkpoint(checkpoint, cut, world, tmp_path):
    assert is_bridge_checkpoint(world / checkpoint) == (checkpoint != "nemo")
    found, expected = HFSource(convert(world / checkpoint, tmp_path / "folder")), HFSource(world / cut)
    assert found.architecture == expected.architecture
    for name, shape in expected.architecture.shapes().items():
        assert np.array_equal(found.read(name, whole(shape)), expected.read(name, whole(shape))), name


def test_a_plan_of_another_model_is_refused_with_the_checkpoints_name(world):
    with pytest.raises(InputError, match=f"that of '{world / 'bridge' / 'iter_0000000'}' is 6"):
        run_prune(str(world / "bridge"), world / "plan-2.json", world / "refused")
    assert not (world / "refused").exists()


EXPORT = """
import sys
from pathlib import Path
def main():
    import nemo_minitron.backend as backend
    backend.setup()
    from nemo.collections import llm
    llm.export_ckpt(Path(sys.argv[1]), "hf", output_path=Path(sys.argv[2]))
if __name__ == "__main__":
    main()
"""


def test_nemos_own_exporter_reads_the_new_context(world):
    (world / "export.py").write_text(EXPORT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [str(NEMO), "export.py", "nemo", "exported"]
    done = subprocess.run(command, cwd=world, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found, expected = HFSource(world / "exported"), HFSource(world / "cut-1")
    for name, shape in expected.architecture.shapes().items():
        assert np.array_equal(found.read(name, whole(shape)), expected.read(name, whole(shape))), name
