"""Every family on Megatron-Bridge: the folder's bits in two layouts, and transformers' logits, for a teacher and its
student that is cut along all axes.

Mutations tried, each of which fails here: Bridge's own reading of a config alone (another activation, linear scaling,
biases, windows, dense layers among mixtures); its general provider without rotary positions; longrope with the short
factors alone, without its scale, or with a whole head rotated.
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
import pico
from contract import CUT_EXPERTS, HYBRIDS, LLAMA3_ROPE, MODELS, NAMES, everything, neurons

from nemo_minitron.errors import InputError
from nemo_minitron.families import FAMILIES, from_hf, read_config
from nemo_minitron.families.bridge import LLAMA3
from nemo_minitron.hosts import check_represented
from nemo_minitron.pruning import prune
from nemo_minitron.settings.host import HOST

WORKER = Path(__file__).with_name("families_worker.py")
BRIDGE = any(name == "megatron-bridge" for names in metadata.packages_distributions().values() for name in names)
LEGAL = LLAMA3_ROPE | {"original_max_position_embeddings": 8192}  # Llama 3.1's own
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 0.7, "mscale_all_dim": 0.3}
LAYOUTS = [{"tp": 2, "sp": True}, {"pp": 2}]
# whose layers differ: stages must know which they hold
BY_LAYER = ("deepseek_v2-own", "deepseek_v3-other", "gpt_oss-own", "qwen2_moe-other", "qwen3_moe-other", "smollm3-own")
LONGROPE = {"phi3-short": 32, "phi3-long": 16}  # the original length of two Phi-3; the tests have 24 tokens


def of_family(name, layout):
    """Experts with biases are whole on a rank."""
    return layout | {"etp": 1} if name.startswith("gpt_oss") and "tp" in layout else layout


CASES = [
    {"name": f"{family}-{next(iter(layout))}", "family": family, "layout": of_family(family, layout)}
    for family in [*NAMES, *LONGROPE]
    for layout in LAYOUTS
    if "tp" in layout or family in BY_LAYER
]
bridge = pytest.mark.skipif(not BRIDGE, reason="Megatron-Bridge is not installed here")


def keep_of(name):
    """What stays; sizes that transformers 5 runs, and two layers in each of two stages."""
    keep = everything() | {"hidden": list(range(40))}
    if name in LONGROPE:  # hidden_size / heads stays
        keep |= {"hidden": list(range(0, 96, 3))}
    if name.startswith(("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek")):
        widths = {layer: {e: neurons(layer + e)[:48] for e in kept} for layer, kept in CUT_EXPERTS.items()}
        keep |= {"expert_ffn": widths, "shared_expert_ffn": {i: contract.latents.shared(i, 48) for i in CUT_EXPERTS}}
    return keep | {"layers": [0, 2]} if name != "qwen3_moe-other" else keep | {"layers": [2, 3]}


def make(folder, name):
    if name in LONGROPE:
        factors = {"short_factor": [1.0, 1.1, 1.3], "long_factor": [1.2, 3.0, 7.0]}
        return pico.pico_phi3(
            folder, **contract.SIZES, hidden_size=96, partial_rotary_factor=0.75, max_position_embeddings=256,
            original_max_position_embeddings=LONGROPE[name], rope_scaling={"type": "longrope", **factors},
        )  # fmt: skip
    if name == "arcee-yarn":
        return contract.make(folder, "arcee-own", rope_scaling=YARN)
    return contract.make(folder, name, **({"rope_scaling": LEGAL} if name == "llama-own" else {}))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in [*NAMES, *LONGROPE]:
        teacher = make(folder / f"{name}-teacher", name)
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
    assert {family.model_type for family in FAMILIES} == {*MODELS, *HYBRIDS}


@bridge
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_folders_bits(case, results):
    assert json.loads((results / f"{case['name']}.json").read_text()) == {"teacher": [], "student": []}


@bridge
@pytest.mark.slow
@pytest.mark.parametrize("model", ["teacher", "student"])
@pytest.mark.parametrize("name", [*NAMES, *LONGROPE])
def test_transformers_logits(name, model, models, results):
    """Of 24 tokens, beyond every window and beyond the original context of YaRN and longrope. The second row is
    padded behind its 17th token: transformers' mask hides it, and for Megatron's it comes after all tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    tokens = torch.from_numpy(np.load(models / "tokens.npy"))
    mask = torch.ones_like(tokens)
    mask[1, 17:] = 0
    # transformers' attention by SDPA leaves a cap of the scores out
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    reference = AutoModelForCausalLM.from_pretrained(models / f"{name}-{model}", **options)
    with torch.no_grad():
        expected = reference(tokens, attention_mask=mask).logits.numpy()
    found = np.load(results / f"{name}-tp.npz")[model]
    assert expected.std() > 0.1
    assert np.abs(found - expected)[mask.bool().numpy()].max() < LOGITS_PICO_FP32


@bridge
def test_a_checkpoint_of_bridge_keeps_longrope(models):
    """What its run_config.yaml would say of the model is the folder's config again, whatever length it was trained
    with."""
    import nemo_minitron.backend as backend

    backend.setup()
    from nemo_minitron.families import family_of
    from nemo_minitron.families.bridge import bridge_fields
    from nemo_minitron.hosts.bridge.models import provider_of
    from nemo_minitron.hosts.bridge.students import _fields
    from nemo_minitron.settings.layout import Layout
    from nemo_minitron.sources.bridge_config import config_of_model

    config = read_config(models / "phi3-long-student")
    provider = provider_of(config, precision="fp32", layout=Layout())
    provider.seq_length = 24
    found = config_of_model(_fields(provider))
    assert bridge_fields(family_of(found), found) == bridge_fields(family_of(config), config)


def test_a_command_asks_its_host_before_it_loads_anything(models, monkeypatch):
    config = read_config(models / "llama-own-teacher")
    config["rope_scaling"] = {**LEGAL, "original_max_position_embeddings": 16}
    monkeypatch.setenv(HOST, "nemo")
    check_represented(config, "estimate")
    monkeypatch.setenv(HOST, "bridge")
    with pytest.raises(InputError, match="old_context_len 16, and Megatron-Bridge's is always 8192"):
        check_represented(config, "estimate")


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
