"""transformers 5 loads every family's student, and what it writes is read: logits equal transformers 4's."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import contract
import numpy as np
import pytest
from contract import CUT_EXPERTS, everything, make, megatron_fields, neurons, plan_of
from test_config_forms import in_form_5
from tolerances import LOGITS_PICO_FP32

from nemo_minitron.evaluation.model import load
from nemo_minitron.families import family_of, from_hf, read_config
from nemo_minitron.pruning import prune

pytestmark = pytest.mark.slow
SQUARE = {"qwen2_moe-own": {"head_dim": 4}, "qwen2_moe-other": {"head_dim": 4}}  # heads x head_dim are 48, as hidden
NAMES = [*contract.NAMES, *SQUARE]
HOME = Path(sys.prefix) / "transformers5"
WORKER = Path(__file__).with_name("transformers5_worker.py")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of each of NAMES: `NAME` as transformers 4 wrote it, `NAME-5` with the config of transformers 5 alone, and
    `NAME-student`, cut from the latter along all axes."""
    if not HOME.is_dir():
        pytest.skip("transformers 5 is not there; make venv puts it into .venv/transformers5")
    work = tmp_path_factory.mktemp("models")
    for name in NAMES:
        teacher = make(work / name, name, **SQUARE.get(name, {}))
        newer = Path(shutil.copytree(teacher, work / f"{name}-5"))
        (newer / "config.json").write_text(json.dumps(in_form_5(read_config(teacher))))
        plan = plan_of(from_hf(newer), everything() | sizes_that_load(name))
        assert family_of(read_config(newer)).remark(plan.target) is None
        prune(newer, plan, work / f"{name}-student")
    command = [sys.executable, str(WORKER), str(HOME), str(work)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return work, dict(np.load(work / "logits.npz"))


def sizes_that_load(name):
    """What of the cut is another one, since transformers 5 refuses the sizes of `everything`."""
    if name.startswith(("llama", "arcee", "gemma")):
        return {"hidden": list(range(40))}  # a multiple of 8 heads
    if name.startswith(("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek")):
        experts = {layer: {e: neurons(layer + e)[:48] for e in kept} for layer, kept in CUT_EXPERTS.items()}
        shared = {layer: contract.latents.shared(layer, 48) for layer in contract.CUT_LAYERS}
        hidden = list(range(16 if name in SQUARE else 40))  # of four heads of 4 channels
        return {"hidden": hidden, "expert_ffn": experts, "shared_expert_ffn": shared}
    return {}


@pytest.mark.parametrize("form", ["", "-5", "-student"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_of_both_versions_are_equal(models, name, form):
    import torch

    work, theirs = models
    model = load(work / f"{name}{form}", "fp32")
    with torch.inference_mode():
        ours = model(torch.arange(3, 3 + 48).reshape(2, 24)).logits.numpy()
    np.testing.assert_allclose(theirs[f"{name}{form}"], ours, rtol=0, atol=LOGITS_PICO_FP32)


@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_5_writes_is_read(models, name):
    """Its own files, not a table of what it is thought to write."""
    work, _ = models
    for form in ("", "-5", "-student"):
        old, new = read_config(work / f"{name}{form}"), read_config(work / f"{name}{form}" / "written5")
        assert from_hf(new) == from_hf(old)
        assert megatron_fields(new) == megatron_fields(old)
        assert family_of(new).unread(new) == []


@pytest.mark.parametrize("name", NAMES)
def test_either_config_gives_the_same_logits(models, name):
    _, theirs = models
    np.testing.assert_array_equal(theirs[name], theirs[f"{name}-5"])
