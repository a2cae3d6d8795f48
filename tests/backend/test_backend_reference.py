"""The twin's layers against torch's and Megatron's own, and its module tree against Transformer Engine's."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bare_models
import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from nemo_minitron.backend import differences
from nemo_minitron.backend.attention import Attention
from nemo_minitron.backend.norms import Norm, normalize
from nemo_minitron.errors import InputError

pytestmark = pytest.mark.usefixtures("one_process")


def norm_config(kind, centered, dtype=torch.float64):
    return SimpleNamespace(
        normalization=kind,
        layernorm_zero_centered_gamma=centered,
        params_dtype=dtype,
        sequence_parallel=True,
        use_cpu_initialization=True,
    )


# -- norms -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_norms_are_torchs(kind, centered):
    torch.manual_seed(0)
    made = Norm(norm_config(kind, centered), hidden_size=10, eps=1e-3)
    start = 0.0 if centered else 1.0
    assert made.weight.tolist() == [start] * 10
    x = torch.randn(3, 2, 10, dtype=torch.float64)
    with torch.no_grad():
        made.weight.add_(torch.randn(10))
    gamma = made.weight + 1 if centered else made.weight
    if kind == "RMSNorm":
        wanted = x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * gamma
        assert made.bias is None
    else:
        with torch.no_grad():
            made.bias.add_(torch.randn(10))
        wanted = F.layer_norm(x, (10,), gamma, made.bias, 1e-3)
    assert torch.allclose(made(x), wanted, rtol=1e-12, atol=1e-12)


def test_norms_compute_in_fp32_and_round_once():
    torch.manual_seed(0)
    x, gamma = torch.randn(64, 96).bfloat16(), (0.01 * torch.randn(96)).bfloat16()
    got = normalize(x, gamma, None, 1e-5, rms=True, zero_centered=True)
    wanted = F.rms_norm(x.double(), (96,), gamma.double() + 1, 1e-5)
    assert got.dtype is torch.bfloat16
    # fp32's own error may fall on either side of a rounding boundary, in a few of 6,144 elements
    assert (got != wanted.bfloat16()).float().mean() < 1e-3


def test_norm_parameters_know_sequence_parallelism_and_their_kind():
    made = Norm(norm_config("LayerNorm", False), hidden_size=4)
    assert made.weight.sequence_parallel
    assert made.bias.sequence_parallel
    with pytest.raises(InputError, match="L2Norm"):
        Norm(norm_config("L2Norm", False), hidden_size=4)


# -- attention ---------------------------------------------------------------------------------------------
def attentions(**overrides):
    """The twin's core attention and Megatron's unfused one, of one config."""
    scale = overrides.pop("softmax_scale", None)
    made = bare_models.config("qk_norm", num_attention_heads=6, num_query_groups=2, **overrides)
    return [
        cls(made, layer_number=2, attn_mask_type=AttnMaskType.causal, attention_type="self", softmax_scale=scale)
        for cls in (Attention, DotProductAttention)
    ]


def qkv(queries=7, keys=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(queries, 3, 6, 8), (keys, 3, 2, 8), (keys, 3, 2, 8)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ({}, None),
        ({"softmax_scale": 0.7}, None),
        ({"window_size": (2, 0)}, None),
        ({"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True}, None),
        ({}, "random"),
        ({"softmax_type": "learnable"}, None),
        ({"softmax_type": "learnable", "window_size": (2, 0), "softmax_scale": 0.7}, None),
        ({"softmax_type": "learnable"}, "random"),
    ],
)
def test_attention_is_megatrons_unfused_one(options, mask):
    ours, theirs = attentions(**options)
    if mask:
        mask = torch.rand(3, 1, 7, 7, generator=torch.Generator().manual_seed(1)) < 0.4
        mask.diagonal(dim1=2, dim2=3).fill_(False)  # a row that sees nothing means something else to each
    results = []
    for attention in (ours, theirs):
        inputs = qkv()
        if attention.softmax_offset is not None:
            with torch.no_grad():
                attention.softmax_offset.copy_(torch.linspace(-1, 2, 6))
            inputs.append(attention.softmax_offset)
        out = attention(*inputs[:3], mask, attn_mask_type=AttnMaskType.causal)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
        results.append([out, *(x.grad for x in inputs)])
    for got, wanted in zip(*results, strict=True):
        assert got.shape == wanted.shape
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_attention_sees_a_cache():
    """One query after six keys sees all; a prompt behind a cache sees what came before each of its tokens."""
    ours, _ = attentions()
    query, key, value = qkv()
    whole = ours(query, key, value)
    assert torch.allclose(ours(query[-1:], key, value), whole[-1:], atol=1e-6)
    assert torch.allclose(ours(query[-3:], key, value), whole[-3:], atol=1e-6)
    free = ours(query[-1:], key, value, attn_mask_type=AttnMaskType.no_mask)
    assert torch.allclose(free, whole[-1:], atol=1e-6)


@pytest.mark.parametrize("kind", ["vanilla", "learnable"])
def test_attention_takes_a_bias(kind):
    """A sink of minus infinity takes no share."""
    ours, _ = attentions(softmax_type=kind)
    if kind == "learnable":
        torch.nn.init.constant_(ours.softmax_offset, float("-inf"))
    query, key, value = qkv()
    forbid = torch.zeros(7, 7).masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf"))
    forbid[:, 0] = forbid[:, 0] + 0.5
    bias = torch.zeros(1, 1, 7, 7)
    bias[..., 0] = 0.5
    wanted = F.scaled_dot_product_attention(
        *(x.permute(1, 2, 0, 3) for x in (query, key, value)), attn_mask=forbid, enable_gqa=True
    )
    got = ours(query, key, value, attention_bias=bias)
    assert torch.allclose(got, wanted.permute(2, 0, 1, 3).flatten(2), atol=1e-6)


def test_attention_refuses_what_it_cannot():
    with pytest.raises(InputError, match="softmax_type"):
        attentions(softmax_type="off-by-one")


# -- the model ---------------------------------------------------------------------------------------------
def names(kind, **options):
    return {n: tuple(p.shape) for n, p in bare_models.build(kind, **options)[0].named_parameters()}


def test_parameters_have_transformer_engines_names():
    got = names("qk_norm")
    layer = {n.removeprefix("decoder.layers.1."): s for n, s in got.items() if n.startswith("decoder.layers.1.")}
    assert layer == {
        "self_attention.linear_proj.weight": (48, 64),
        "self_attention.linear_qkv.layer_norm_weight": (48,),
        "self_attention.linear_qkv.weight": (128, 48),
        "self_attention.q_layernorm.weight": (8,),
        "self_attention.k_layernorm.weight": (8,),
        "mlp.linear_fc1.layer_norm_weight": (48,),
        "mlp.linear_fc1.weight": (120, 48),
        "mlp.linear_fc2.weight": (48, 60),
    }
    rest = {n for n in got if not n.startswith("decoder.layers.")}
    assert rest == {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"}


def test_layer_norms_and_linears_have_biases():
    got = {n.removeprefix("decoder.layers.0.") for n in names("nemotron")}
    for linear in ("self_attention.linear_qkv", "mlp.linear_fc1"):
        assert {f"{linear}.{n}" for n in ("layer_norm_weight", "layer_norm_bias", "weight", "bias")} <= got
    assert {"self_attention.linear_proj.bias", "mlp.linear_fc2.bias", "decoder.final_layernorm.bias"} <= got


def test_experts_have_no_fused_norm():
    got = {n.removeprefix("decoder.layers.1.") for n in names("moe")}  # the first layer is dense
    assert {"pre_mlp_layernorm.weight", "mlp.router.weight"} <= got
    assert {f"mlp.experts.local_experts.{e}.linear_fc1.weight" for e in range(4)} <= got
    assert not any("experts" in n and "layer_norm" in n for n in got)


def test_a_checkpoint_has_transformer_engines_keys():
    """Norms whole, and an `_extra_state` wherever Transformer Engine asks for one when it loads."""
    state = bare_models.build("qk_norm")[0].sharded_state_dict()
    keys = {k.removeprefix("decoder.layers.0.") for k in state if k.startswith("decoder.layers.0.")}
    with_state = {"self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2",
                  "self_attention.q_layernorm", "self_attention.k_layernorm"}  # fmt: skip
    assert {k.removesuffix("._extra_state") for k in keys if k.endswith("_extra_state")} == with_state
    assert "decoder.final_layernorm._extra_state" in state
    norm = state["decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"]
    assert norm.key == "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
    assert norm.global_shape == (4, 48)  # the layers, stacked


def test_extra_state_of_either_side_loads():
    model = bare_models.build("qk_norm")[0]
    state = model.state_dict()
    ours = {k: v for k, v in state.items() if not k.endswith("_extra_state")}
    model.load_state_dict(ours)  # none
    theirs = {k: torch.empty(0, dtype=torch.uint8) if k.endswith("_extra_state") else v for k, v in state.items()}
    model.load_state_dict(theirs)  # Transformer Engine's, of a run without FP8


def test_shards_are_marked_also_where_nothing_is_initialised():
    """Else the gradient's norm counts one rank's shard alone."""
    made = bare_models.build("qk_norm", perform_initialization=False)[0]
    layer = made.decoder.layers[0]
    for linear, dim in ((layer.self_attention.linear_qkv, 0), (layer.mlp.linear_fc2, 1)):
        assert linear.weight.tensor_model_parallel
        assert linear.weight.partition_dim == dim
    assert not hasattr(layer.mlp.linear_fc1.layer_norm_weight, "tensor_model_parallel")


def test_the_norm_is_in_front_of_the_linear():
    made = bare_models.build("qk_norm")[0].decoder.layers[0].mlp.linear_fc1
    x = torch.randn(5, 2, 48, generator=torch.Generator().manual_seed(0))
    wanted = F.linear(F.rms_norm(x, (48,), made.layer_norm_weight, 3e-5), made.weight)
    got, bias = made(x)
    assert bias is None
    assert torch.allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("kind", list(bare_models.KINDS))
def test_the_model_is_causal_and_differentiable(kind):
    made = bare_models.build(kind)[0]
    tokens = bare_models.tokens(2, length=12)
    positions = torch.arange(12).expand(2, 12)
    with torch.no_grad():
        first = made(tokens, positions, None)
        changed = made(torch.cat([tokens[:, :6], (tokens[:, 6:] + 1) % bare_models.VOCAB], 1), positions, None)
    assert torch.allclose(first[:, :6], changed[:, :6], atol=1e-5)
    assert not torch.allclose(first[:, 6:], changed[:, 6:], atol=1e-2)
    made(tokens, positions, None, labels=tokens).mean().backward()
    assert [n for n, p in made.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_a_checkpoint_with_fp8_state_loads_on_a_cpu(tmp_path):
    """As Megatron writes it on a GPU: an object for each linear of each layer, in torch_dist's files."""
    script = Path(__file__).with_name("te_state_script.py")
    command = [sys.executable, str(script), str(tmp_path / "checkpoint"), str(tmp_path / "out.json")]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["same"]
    assert all(found["same"].values())
    assert sum("linear_qkv._extra_state/shard_" in key for key in found["objects"]) == 4  # of each layer


def test_experts_with_biases_need_a_megatron_that_trains_them(monkeypatch):
    """Under tensor parallelism; on one rank every version does."""
    monkeypatch.setattr(differences, "installed", lambda package: "0.15.3")
    differences.check_biased_experts(bare_models.config("sinks"))
    with pytest.raises(InputError, match=r"experts with biases at tp=2 need Megatron-core 0.19"):
        differences.check_biased_experts(SimpleNamespace(tensor_model_parallel_size=2))
    monkeypatch.setattr(differences, "installed", lambda package: "0.19.2")
    differences.check_biased_experts(SimpleNamespace(tensor_model_parallel_size=2))
