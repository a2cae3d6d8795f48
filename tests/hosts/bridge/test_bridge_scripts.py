"""A user's own scripts on Bridge: the two examples as they are, and the cut of a live model in several processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pico import pico_llama
from ranks import run_ranks
from words import save_tokenizer

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.data import build, load_tokenizer
from nemo_minitron.families import from_hf
from nemo_minitron.pruning import HFSource, prune
from nemo_minitron.search import random_plan
from nemo_minitron.sources.open import open_source
from nemo_minitron.sources.tensors import whole

pytestmark = [pytest.mark.slow, pytest.mark.bridge]
WORKER = Path(__file__).parent / "pruning_worker.py"
EXAMPLES = Path(__file__).parents[3] / "examples"
TEXTS = [f"the model number {i} reads {i * 7} words and the next {'word ' * (i % 9)}ends." for i in range(300)]
# Three layers are an uneven pipeline; transformers 5 refuses this Llama's sizes.
KEEP = {"ffn": 66, "layers": 3, "hidden": 40, "heads": 6}
LAYOUTS = {
    "one": (1, {}),
    "tp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp": (2, {"pipeline_model_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    teacher = pico_llama(
        folder / "llama", vocab_size=512, hidden_size=48, num_attention_heads=8, num_key_value_heads=2,
        num_hidden_layers=6, tie_word_embeddings=True,
    )  # fmt: skip
    save_tokenizer(teacher, TEXTS, 512)
    prune(teacher, random_plan(from_hf(teacher), keep={"ffn": 64, "layers": 4}), folder / "llama-student")
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    build(folder / "corpus.jsonl", load_tokenizer(teacher), folder / "corpus")
    return folder


def check_cut(teacher, out, place):
    """The student of a script has the bits of the same cut by hand. Returns the plan."""
    plan = PrunePlan.load(out / "plan.json")
    expected, cut = HFSource(prune(teacher, plan, place)), open_source(out / "student")
    assert cut.architecture == expected.architecture
    for name, shape in expected.architecture.shapes().items():
        assert np.array_equal(expected.read(name, whole(shape)), cut.read(name, whole(shape))), name
    return plan


@pytest.mark.parametrize("script", ["bridge_distill.py", "bridge_prune.py"])
def test_a_users_own_script(script, models, tmp_path):
    first = models / "llama-student" if "distill" in script else models / "llama"
    places = [first, models / "llama"] if "distill" in script else [first]
    command = [EXAMPLES / script, *places, models / "corpus", tmp_path / "out"]
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    environment["MASTER_PORT"] = str(free_port())
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    if "distill" in script:
        assert open_source(tmp_path / "out").architecture == from_hf(first)
        return
    plan = check_cut(models / "llama", tmp_path / "out", tmp_path / "by-hand")
    assert (plan.target.ffn_hidden_size, plan.target.num_layers) == (64, 3)


@pytest.fixture(scope="module")
def plans(models, tmp_path_factory):
    """Layout -> the plan that the script made of the live model in it, whose student was compared."""
    out, found = tmp_path_factory.mktemp("live"), {}
    for name, (world, layout) in LAYOUTS.items():
        teacher, given = models / "llama", [json.dumps(KEEP), json.dumps(layout)]
        run_ranks(world, WORKER, teacher, models / "corpus", out / name, *given)
        found[name] = check_cut(teacher, out / name, out / f"{name}-by-hand")
    return found


def test_a_student_that_cannot_run_in_the_layout_is_refused_before_the_first_batch(models, tmp_path):
    """The ranks end with the sentence, and nothing is scored."""
    given = [json.dumps(KEEP | {"ffn": 67}), json.dumps(LAYOUTS["tp"][1])]
    with pytest.raises(AssertionError, match="tp=2 does not divide 6 heads, 2 query groups and an ffn of 67"):
        run_ranks(2, WORKER, models / "llama", models / "corpus", tmp_path / "out", *given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_a_live_model_is_cut_as_in_one_process(layout, plans):
    assert plans[layout].keep == plans["one"].keep


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
