"""DeepSeek on Megatron-Bridge beyond the families' contract: scores and checkpoints in every layout, YaRN's scale of
the softmax, a router's groups, padding, packed rows, bf16, and a training that leaves the correction biases alone.

Mutations tried, each of which fails here or in test_families.py: the correction biases left at 0, or rounded to bf16;
Megatron's own `linear_q_proj` without a latent of queries; the norms' epsilon of 1e-5 for the latents; `mscale_all_dim`
left out; the scaling factor left out.
"""

import json
import math
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from pico import pico_deepseek_v2, pico_deepseek_v3, raw_tensors
from ranks import run_ranks
from tolerances import LOGITS_PICO_FP32, SCORES_FLOAT64, SCORES_FP32

from nemo_minitron.families import from_hf

WORKER = Path(__file__).with_name("deepseek_worker.py")
BRIDGE = any(name == "megatron-bridge" for names in metadata.packages_distributions().values() for name in names)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BRIDGE, reason="Megatron-Bridge is not installed here")]
LAYOUTS = {
    "dp": {"dp": 2}, "ep": {"ep": 2, "dp": 2}, "pp": {"pp": 2}, "tp": {"tp": 2, "sp": True}, "cp": {"cp": 2},
    "tp-ep": {"tp": 2, "ep": 2, "etp": 1, "sp": True},
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16, "beta_fast": 32.0}
YARN |= {"beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.707}
SIZES = {"num_hidden_layers": 4, "num_attention_heads": 8}
MODELS = {  # V2-Lite's kind; V3's with groups; Moonlight's kind, whose other norms have an epsilon of their own
    "lite": (pico_deepseek_v2, SIZES | {"rope_scaling": YARN}),
    "groups": (
        pico_deepseek_v3,
        SIZES | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
    ),
    "moonlight": (pico_deepseek_v3, SIZES | {"q_lora_rank": None, "rms_norm_eps": 1e-2}),
}
CASES = [
    {"name": f"{model}-{name}", "model": model, "layout": layout}
    for model in ("lite", "groups")
    for name, layout in LAYOUTS.items()
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, (make, sizes) in MODELS.items():
        make(folder / name, **sizes)
    np.save(folder / "tokens.npy", np.random.default_rng(3).integers(0, 509, (4, 24)))
    return folder


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("world2")
    run_ranks(2, WORKER, models, json.dumps(CASES), out)
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_a_checkpoint_of_any_layout_is_the_folder_again(case, results):
    assert json.loads((results / f"{case['name']}.json").read_text()) == []


@pytest.mark.parametrize("case", [case for case in CASES if "-dp" not in case["name"]], ids=lambda case: case["name"])
def test_scores_of_a_layout_are_one_processs(case, results):
    one, found = np.load(results / f"{case['model']}-dp.npz"), np.load(results / f"{case['name']}.npz")
    axes = {"heads", "experts", "expert_ffn", "shared_expert_ffn", "ffn", "hidden", "layers"}
    wanted = {f"{method}-{axis}" for method in ("activation", "taylor") for axis in axes} | {"activation-kv_latent"}
    wanted |= {"activation-q_latent"} if case["model"] == "groups" else set()
    assert wanted <= {*one.files}
    assert not {"activation-query_groups", "taylor-query_groups"} & {*one.files}
    for score in one.files:
        largest = np.abs(one[score]).max(-1, keepdims=True)
        assert np.all(np.abs(found[score] - one[score]) <= SCORES_FP32 * largest), score


def reference(folder, dtype):
    """transformers' model; V2's softmax has the scale that its own code leaves out."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    if dtype is torch.float64:
        model.set_experts_implementation("eager")
    for module in model.modules():
        if type(module).__name__ == "DeepseekV2Attention":
            scale = 0.1 * YARN["mscale_all_dim"] * math.log(YARN["factor"]) + 1
            module.scaling = scale * scale / math.sqrt(module.qk_head_dim)
    return model.eval()


@pytest.mark.parametrize("name", ["lite", "groups"])
def test_scores_are_transformers_in_float64(name, models, results):
    """Of L2 over the samples of one group, and the mean over positions: the heads' outputs, the latents behind their
    norms, the shared experts' neurons; of experts the mean over an expert's tokens of its output's norm, times what the
    router gives it, in which the correction bias is not."""
    import torch

    found, seen = np.load(results / f"{name}-dp.npz"), {}
    model = reference(models / name, torch.float64)

    def keep(key):
        return lambda module, given, out=None: seen.update({key: given[0].detach()})

    def outputs(key):
        return lambda module, given, out: seen.update({key: out.detach()})

    def experts(layer):
        return lambda module, given, out: seen.update({("experts", layer): norms_of(module, *given)})

    for i, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(keep(("heads", i)))
        layer.self_attn.kv_a_layernorm.register_forward_hook(outputs(("kv_latent", i)))
        if name == "groups":
            layer.self_attn.q_a_layernorm.register_forward_hook(outputs(("q_latent", i)))
        if i:
            layer.mlp.shared_experts.down_proj.register_forward_pre_hook(keep(("shared_expert_ffn", i)))
            layer.mlp.experts.register_forward_hook(experts(i))
    with torch.no_grad():
        model(torch.from_numpy(np.load(models / "tokens.npy")))
    assert len(seen) >= 4 * 2 + 3 * 2
    for (axis, layer), values in seen.items():
        if axis == "heads":
            values = values.unflatten(-1, (8, -1)).norm(dim=-1)
        wanted = values if axis == "experts" else values.abs().mean(1).norm(dim=0)
        wanted = wanted.numpy()
        np.testing.assert_allclose(
            found[f"activation-{axis}"][layer], wanted, rtol=0, atol=SCORES_FLOAT64 * wanted.max(), err_msg=axis
        )


def norms_of(experts, hidden, indices, weights):
    import torch

    found = []
    for e in range(experts.num_experts):
        came, place = torch.where(indices == e)
        gate, up = (hidden[came] @ experts.gate_up_proj[e].T).chunk(2, dim=-1)
        out = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[e].T * weights[came, place, None]
        found.append(out.norm(dim=-1).mean() if len(came) else torch.tensor(0.0))
    return torch.stack(found)


# -- one process -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def live(models):
    from workers import load_model

    import nemo_minitron.backend as backend

    backend.setup()
    return {name: load_model(models / name)[0].eval() for name in MODELS}


def logits(model, tokens, **more):
    import torch

    positions = more.pop("positions", torch.arange(tokens.shape[1]).expand_as(tokens))
    with torch.no_grad():
        return model(input_ids=tokens, position_ids=positions, attention_mask=None, **more)


@pytest.mark.parametrize("name", MODELS)
def test_padding_and_positions_beyond_the_original_context(name, models, live):
    """120 tokens, with 16 original positions in V2-Lite's kind; a shorter sample is padded on the right."""
    import torch

    tokens = torch.from_numpy(np.random.default_rng(5).integers(0, 509, (2, 120)))
    mask = torch.ones_like(tokens)
    mask[1, 70:] = 0
    with torch.no_grad():
        expected = reference(models / name, torch.float32)(tokens, attention_mask=mask).logits
    difference = (logits(live[name], tokens)[..., :509] - expected).abs().amax(-1)
    assert expected.std() > 0.1
    assert difference[mask.bool()].max() < LOGITS_PICO_FP32


@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_do_not_see_each_other(name, live):
    """Two samples of 40 and 80 tokens in a row: each has the logits that it has alone."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    first, second = (torch.from_numpy(np.random.default_rng(n).integers(0, 509, (1, n))) for n in (40, 80))
    ends, positions = torch.tensor([0, 40, 120], dtype=torch.int32), [torch.arange(n)[None] for n in (40, 80)]
    packed = PackedSeqParams("thd", ends, ends, None, None, 80, 80)
    model = live[name]
    both = logits(model, torch.cat([first, second], 1), positions=torch.cat(positions, 1), packed_seq_params=packed)
    alone = torch.cat([logits(model, first), logits(model, second)], 1)
    assert (both - alone).abs().max() < LOGITS_PICO_FP32


def test_evaluation_has_the_scale_that_transformers_leaves_out(models, live):
    """`evaluate` and `chat` load V2 with the softmax scale of DeepSeek's own code, which Megatron has, too."""
    import torch
    from transformers import AutoModelForCausalLM

    from nemo_minitron.evaluation.model import load

    tokens = torch.from_numpy(np.load(models / "tokens.npy"))
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(models / "lite", dtype=torch.float32)(tokens).logits
        mended = load(models / "lite", "fp32")(tokens).logits
    expected = logits(live["lite"], tokens)[..., :509]
    assert (mended - expected).abs().max() < LOGITS_PICO_FP32
    assert (plain - expected).abs().max() > 1000 * LOGITS_PICO_FP32


def test_queries_of_hidden_states_are_normed_once(live):
    """The place in Megatron-core that this package goes around: its own layers would have a second norm there."""
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    attention = live["lite"].decoder.layers[1].self_attention
    assert getattr(attention.linear_q_proj, "layer_norm_weight", None) is None
    theirs = MLASelfAttention._resolve_qk_norm_config(attention, parts_of(live["lite"].config))
    assert theirs["linear_q_proj"].__name__ == "LayerNormColumnParallelLinear"


def parts_of(config):
    from nemo_minitron.hosts.bridge.deepseek import layer_spec

    return layer_spec(config).layer_specs[0].submodules.self_attention.submodules


def test_biases_stay_fp32_in_a_model_in_bf16(models):
    """In the live model, bit for bit, and read from it again."""
    from workers import load_model

    import nemo_minitron.backend as backend

    backend.setup()
    from nemo_minitron.megatron.live import LiveSource
    from nemo_minitron.sources.tensors import whole

    (model,) = load_model(models / "groups", precision="bf16")
    source = LiveSource([model], from_hf(models / "groups"))
    stored = raw_tensors(models / "groups")
    for layer in (1, 2, 3):
        name = f"layers.{layer}.router.expert_bias"
        assert source.dtype(name) == "F32"
        wanted = stored[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
        assert np.abs(wanted.view(np.float32)).min() > 0
        np.testing.assert_array_equal(source.read(name, whole(wanted.shape)), wanted)
    assert source.dtype("layers.1.router.weight") == "BF16"
