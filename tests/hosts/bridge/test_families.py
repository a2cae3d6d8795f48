"""Every family on Megatron-Bridge: the folder's bits in two layouts, and transformers' logits, for a teacher and its
student that is cut along all axes.

Mutations tried, each of which fails here: Bridge's own reading of a config alone (another activation, linear scaling,
biases, windows, dense layers among mixtures); its general provider without rotary positions.
"""

import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from tolerances import LOGITS_PICO_FP32

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))

import contract
from contract import CUT_EXPERTS, LLAMA3_ROPE, MODELS, NAMES, everything, neurons

from nemo_minitron.errors import InputError
from nemo_minitron.families import FAMILIES, from_hf, read_config
from nemo_minitron.families.bridge import LLAMA3
from nemo_minitron.hosts import check_represented
from nemo_minitron.pruning import prune
from nemo_minitron.settings.host import HOST

WORKER = Path(__file__).with_name("families_worker.py")
BRIDGE = any(name == "megatron-bridge" for names in metadata.packages_distributions().values() for name in names)
LEGAL = LLAMA3_ROPE | {"original_max_position_embeddings": 8192}  # Llama 3.1's own
LAYOUTS = [{"tp": 2, "sp": True}, {"pp": 2}]
BY_LAYER = ("qwen3_moe-other", "smollm3-own")  # whose layers differ: stages must know which they hold
CASES = [
    {"name": f"{family}-{next(iter(layout))}", "family": family, "layout": layout}
    for family in NAMES
    for layout in LAYOUTS
    if "tp" in layout or family in BY_LAYER
]
bridge = pytest.mark.skipif(not BRIDGE, reason="Megatron-Bridge is not installed here")


def keep_of(name):
    """What stays; sizes that transformers 5 runs, and two layers in each of two stages."""
    keep = everything() | {"hidden": list(range(40))}
    if name.startswith(("mixtral", "qwen3_moe")):
        widths = {layer: {e: neurons(layer + e)[:48] for e in kept} for layer, kept in CUT_EXPERTS.items()}
        keep |= {"expert_ffn": widths}
    return keep | {"layers": [0, 2]} if name != "qwen3_moe-other" else keep | {"layers": [2, 3]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in NAMES:
        teacher = contract.make(
            folder / f"{name}-teacher", name, **({"rope_scaling": LEGAL} if name == "llama-own" else {})
        )
        plan = contract.plan_of(from_hf(teacher), keep_of(name))
        plan.save(folder / f"{name}-plan.json")
        prune(teacher, plan, folder / f"{name}-student")
    np.save(folder / "tokens.npy", np.random.default_rng(3).integers(0, 509, (2, 24)))
    return folder


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    """One worker runs all families and layouts."""
    out = tmp_path_factory.mktemp("world2")
    run_ranks(2, WORKER, models, json.dumps(CASES), out)
    return out


def test_every_family_is_here():
    assert {family.model_type for family in FAMILIES} == set(MODELS)


@bridge
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_folders_bits(case, results):
    assert json.loads((results / f"{case['name']}.json").read_text()) == {"teacher": [], "student": []}


@bridge
@pytest.mark.slow
@pytest.mark.parametrize("model", ["teacher", "student"])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_logits(name, model, models, results):
    import torch
    from transformers import AutoModelForCausalLM

    tokens = torch.from_numpy(np.load(models / "tokens.npy"))
    reference = AutoModelForCausalLM.from_pretrained(models / f"{name}-{model}", dtype=torch.float32)
    with torch.no_grad():
        expected = reference(tokens).logits.numpy()
    found = np.load(results / f"{name}-tp.npz")[model]
    assert expected.std() > 0.1
    assert np.abs(found - expected).max() < LOGITS_PICO_FP32


def test_a_command_asks_its_host_before_it_loads_anything(models, monkeypatch):
    config = read_config(models / "llama-own-teacher")
    config["rope_scaling"] = {**LEGAL, "original_max_position_embeddings": 16}
    monkeypatch.setenv(HOST, "nemo")
    check_represented(config)
    monkeypatch.setenv(HOST, "bridge")
    with pytest.raises(InputError, match="old_context_len 16, and Megatron-Bridge's is always 8192"):
        check_represented(config)


@bridge
def test_megatron_has_one_scaling_of_llama_3():
    """The numbers of `LLAMA3`, in its order, are what Megatron's GPTModel uses; it gives the factor alone."""
    import inspect

    import nemo_minitron.backend as backend

    backend.setup()
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    parameters = inspect.signature(RotaryEmbedding._apply_scaling).parameters
    names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    assert [parameters[name].default for name in names] == list(LLAMA3.values())
