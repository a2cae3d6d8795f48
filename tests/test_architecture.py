"""Sizes against the published models and against transformers' own count."""

import dataclasses
import math

import pytest

from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import InputError

NEMOTRON = {"gated_mlp": False, "normalization": "layernorm"}
QWEN3 = {"qk_norm": True}
QWEN3_MOE = QWEN3 | {"num_moe_experts": 128, "moe_router_topk": 8, "moe_ffn_hidden_size": 768}
# name: layers, hidden, heads, groups, ffn, vocab, features, billions, billions without embeddings
TABLE = {
    "nemotron-4-15b": (32, 6144, 48, 8, 24576, 256_000, NEMOTRON, 15.629, 12.483),
    "minitron-8b": (32, 4096, 48, 8, 16384, 256_000, NEMOTRON, 8.272, 6.175),
    "minitron-4b": (32, 3072, 24, 8, 9216, 256_000, NEMOTRON, 4.191, 2.618),
    "llama-3.1-8b": (32, 4096, 32, 8, 14336, 128_256, {}, 8.030, 6.980),
    "llama-3.1-minitron-4b-width": (32, 3072, 32, 8, 9216, 128_256, {}, 4.513, 3.725),
    "llama-3.1-minitron-4b-depth": (16, 4096, 32, 8, 14336, 128_256, {}, 4.540, 3.490),
    "mistral-nemo-12b": (40, 5120, 32, 8, 14336, 131_072, {}, 12.248, 10.906),
    "mn-minitron-8b": (40, 4096, 32, 8, 11520, 131_072, {}, 8.414, 7.340),
    "qwen3-8b": (36, 4096, 32, 8, 12288, 151_936, QWEN3, 8.191, 6.946),
    "qwen3-6b-depth": (24, 4096, 32, 8, 12288, 151_936, QWEN3, 5.875, 4.631),
    "qwen3-6b-width": (36, 3584, 32, 8, 9216, 151_936, QWEN3, 5.978, 4.889),
    "qwen3-30b-a3b": (48, 2048, 32, 4, 6144, 151_936, QWEN3_MOE, 30.532, 29.910),
    "qwen3-16b-experts": (48, 2048, 32, 4, 6144, 151_936, QWEN3_MOE | {"num_moe_experts": 64}, 16.030, 15.408),
}
EXACT = {"llama-3.1-8b": 8_030_261_248, "mistral-nemo-12b": 12_247_782_400, "qwen3-8b": 8_190_735_360}
EXACT |= {"nemotron-4-15b": 15_628_775_424, "minitron-8b": 8_271_699_968, "minitron-4b": 4_190_509_056}
EXACT |= {"qwen3-30b-a3b": 30_532_122_624, "qwen3-16b-experts": 16_030_316_544}


def of_table(name):
    layers, hidden, heads, groups, ffn, vocab, features, *_ = TABLE[name]
    return Architecture(
        num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=heads,
        num_query_groups=groups, head_dim=128, vocab_size=vocab, **features,
    )  # fmt: skip


def smollm2(**sizes):
    values = {
        "num_layers": 30, "hidden_size": 576, "ffn_hidden_size": 1536, "num_attention_heads": 9,
        "num_query_groups": 3, "head_dim": 64, "vocab_size": 49_152, "tied_embeddings": True,
    }  # fmt: skip
    return Architecture(**values | sizes)


@pytest.mark.parametrize("name", TABLE)
def test_published_models(name):
    architecture, (*_, billions, without) = of_table(name), TABLE[name]
    assert round(architecture.parameters() / 1e9, 3) == billions
    assert round(architecture.parameters(embeddings=False) / 1e9, 3) == without
    assert architecture.parameters() == EXACT.get(name, architecture.parameters())
    assert sum(map(math.prod, architecture.shapes().values())) == architecture.parameters()


def test_smollm2():
    assert smollm2().parameters() == 134_515_008
    assert smollm2(ffn_hidden_size=1024, hidden_size=448).parameters() == 83_978_944
    assert smollm2(tied_embeddings=False).parameters() == 134_515_008 + 49_152 * 576


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("attention_bias", "mlp_bias"), [(False, False), (True, False), (True, True)])
def test_names_and_count_are_transformers(tied, attention_bias, mlp_bias):
    import torch
    from pico import SIZES
    from transformers import LlamaConfig, LlamaForCausalLM

    from nemo_minitron.families import family_of, from_hf

    biases = {"attention_bias": attention_bias, "mlp_bias": mlp_bias, "tie_word_embeddings": tied}
    config = LlamaConfig(**SIZES | biases, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    architecture = from_hf(config.to_dict())
    shapes = architecture.shapes()
    names = family_of(config.to_dict()).hf_tensors(architecture)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {name: shapes[part] for name, (part,) in names.items()} == expected
    assert architecture.parameters() == model.num_parameters()


def test_memory_by_hand():
    llama = of_table("llama-3.1-8b")
    cache = 2 * 32 * 8 * 128 * 3 * 1000  # keys and values, layers, groups, head_dim, batch, context
    assert llama.memory(batch=3, context=1000) == 2 * 8_030_261_248 + 2 * cache
    outside = 2 * 128_256 * 4096 + 65 * 4096
    fp8 = llama.memory(batch=3, context=1000, weights="fp8", kv_cache="fp8")
    assert fp8 == (8_030_261_248 - outside) + 2 * outside + cache
    with pytest.raises(InputError, match="did you mean 'bf16'"):
        llama.memory(batch=1, context=1, weights="bf61")


def test_flops_by_hand():
    tied, untied = smollm2(), smollm2(tied_embeddings=False)
    matrices = 134_515_008 - 61 * 576  # the tied matrix works once, as the head
    assert tied.flops_per_token(context=100) == 2 * (matrices + 2 * 30 * 9 * 64 * 100)
    assert untied.flops_per_token() == tied.flops_per_token()


def windowed(*freq, **sizes):
    return smollm2(num_layers=6, attention_window=512, window_attn_skip_freq=freq or None, **sizes)


@pytest.mark.parametrize(("freq", "context", "seen"), [
    ((1, 1, 1, 1, 1, 0), 4096, 5 * 512 + 4096),  # Gemma 3's pattern
    ((1, 1, 1, 1, 1, 0), 500, 6 * 500),
    ((), 4096, 6 * 512),
    ((0,) * 6, 4096, 6 * 4096),
])  # fmt: skip
def test_a_layer_with_a_window_looks_no_further(freq, context, seen):
    whole, some = smollm2(num_layers=6), windowed(*freq)
    assert some.memory(batch=3, context=context) - whole.memory(batch=3, context=0) == 2 * 2 * 3 * 3 * 64 * seen
    assert some.flops_per_token(context) - whole.flops_per_token(0) == 2 * 2 * 9 * 64 * seen
    assert some.parameters() == whole.parameters()


def test_windows_go_with_their_layers():
    some = windowed(1, 1, 0, 1, 1, 0)
    assert some.keep_layers([1, 2, 5]).window_attn_skip_freq == (1, 0, 0)
    assert some.keep_layers([0, 4]).memory(batch=1, context=900) == windowed(1, 1, 1, 1, 1, 1).replace(
        num_layers=2
    ).memory(batch=1, context=900)
    assert some.keep_layers([2, 5]).attention_window is None
    number = some.replace(num_layers=3)  # which ones stay is not known: at most as much
    assert number.memory(batch=1, context=900) == smollm2(num_layers=3).memory(batch=1, context=900)
    assert windowed().replace(num_layers=3).attention_window == 512


def test_windows_as_plain_values():
    import json

    some = windowed(1, 1, 0, 1, 1, 0)
    read = Architecture.from_dict(json.loads(json.dumps(some.as_dict())))
    assert (read.attention_window, read.window_attn_skip_freq) == (512, (1, 1, 0, 1, 1, 0))
    assert not [name for name in smollm2().as_dict() if "window" in name]  # files of other models stay as they were
    assert some == smollm2(num_layers=6)  # the same tensors
    for bad in ((1, 0), (1, 2, 0, 0, 0, 0), 3):
        with pytest.raises(InputError, match="legal is a 0 or 1 for each of the 6 layers"):
            some.replace(window_attn_skip_freq=bad)
    with pytest.raises(InputError, match="attention_window is 0; it must be a whole number of at least 1"):
        some.replace(attention_window=0)


@pytest.mark.parametrize("bad", [0, -1, 2.0, float("nan"), "8", None, True])
def test_illegal_sizes(bad):
    with pytest.raises(InputError, match="hidden_size is"):
        smollm2(hidden_size=bad)


def test_illegal_combinations():
    with pytest.raises(InputError, match=r"10 attention heads.* nearest legal number of heads is 9"):
        smollm2(num_attention_heads=10)
    with pytest.raises(InputError, match="did you mean 'rmsnorm'"):
        smollm2(normalization="rmsnrom")


def test_plain_values():
    architecture = smollm2()
    assert Architecture.from_dict(architecture.as_dict()) == architecture
    assert dataclasses.asdict(architecture).items() >= architecture.as_dict().items()
    with pytest.raises(InputError, match="no field 'num_layer'; did you mean 'num_layers'"):
        Architecture.from_dict(architecture.as_dict() | {"num_layer": 3})
    values = architecture.as_dict()
    del values["head_dim"]
    with pytest.raises(InputError, match="needs head_dim"):
        Architecture.from_dict(values)


# -- mixtures of experts ---------------------------------------------------------------------------------------
MIXTRAL = {
    "num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32,
    "num_query_groups": 8, "head_dim": 128, "vocab_size": 32_000, "tied_embeddings": False, "num_moe_experts": 8,
}  # fmt: skip


def mixed(**sizes):
    """Layers 0 and 3 of six are mixtures of four experts, two for a token, beside a gated shared expert."""
    values = {
        "num_layers": 6, "num_moe_experts": 4, "moe_ffn_hidden_size": 320, "moe_layer_freq": 3,
        "moe_shared_expert_intermediate_size": 448, "moe_shared_expert_gate": True,
    }  # fmt: skip
    return smollm2(**values | sizes)


def test_mixtral_8x7b():
    mixtral = smollm2(**MIXTRAL)
    assert mixtral.parameters() == 46_702_792_704  # as published, and 12.9 billion active
    assert mixtral.parameters(active=True) == 46_702_792_704 - 32 * 6 * 3 * 4096 * 14336
    assert mixtral.parameters(embeddings=False, active=True) == 12_879_925_248 - 2 * 32_000 * 4096
    matrices = 12_879_925_248 - 32_000 * 4096 - 65 * 4096
    assert mixtral.flops_per_token(context=10) == 2 * (matrices + 2 * 32 * 32 * 128 * 10)
    bf16_alone = 2 * 32_000 * 4096 + 65 * 4096 + 32 * 8 * 4096  # embedding and head, norms, routers
    fp8 = mixtral.memory(batch=1, context=0, weights="fp8")
    assert fp8 == 46_702_792_704 + bf16_alone


def test_mixtral_8x22b():
    sizes = {"num_layers": 56, "hidden_size": 6144, "num_attention_heads": 48, "ffn_hidden_size": 16384}
    mixtral = smollm2(**MIXTRAL | sizes)
    assert mixtral.parameters() == 140_620_634_112  # as published, with 32,000 tokens


@pytest.mark.parametrize("dense", [[], [0], [1, 4]])
def test_count_of_qwen2_moe_is_transformers(dense):
    """Shared experts with a gate, and layers that are dense."""
    import torch
    from pico import SIZES
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        **SIZES, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=40, mlp_only_layers=dense,
        shared_expert_intermediate_size=56,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(config)
    architecture = Architecture(
        num_layers=6, hidden_size=48, ffn_hidden_size=96, num_attention_heads=6, num_query_groups=3, head_dim=8,
        vocab_size=509, qkv_bias=True, num_moe_experts=5, moe_router_topk=3, moe_ffn_hidden_size=40,
        moe_shared_expert_intermediate_size=56, moe_shared_expert_gate=True,
        moe_layer_freq=tuple(int(layer not in dense) for layer in range(6)),
    )  # fmt: skip
    assert architecture.parameters() == model.num_parameters()
    assert architecture.parameters(active=True) == model.num_parameters() - (6 - len(dense)) * 2 * 3 * 48 * 40


def test_one_spelling_of_each_mixture():
    assert mixed() == mixed(moe_layer_freq=(1, 0, 0, 1, 0, 0))
    assert (mixed().moe_layers, mixed().dense_layers) == ((0, 3), (1, 2, 4, 5))
    everywhere = mixed(moe_layer_freq=(1,) * 6)
    assert everywhere == mixed(moe_layer_freq=1)
    assert everywhere.ffn_hidden_size == 320  # no layer has the dense width
    assert smollm2(num_moe_experts=2).moe_ffn_hidden_size == 1536
    assert smollm2(num_moe_experts=0, moe_router_topk=1) == smollm2()
    assert everywhere.replace(moe_ffn_hidden_size=100).ffn_hidden_size == 100


def test_mixtures_survive_cuts_of_layers():
    assert mixed().keep_layers([1, 3, 4]) == mixed(num_layers=3, moe_layer_freq=(0, 1, 0))
    assert mixed().keep_layers([0, 3]) == mixed(num_layers=2, moe_layer_freq=1)
    assert mixed().keep_layers([1, 2]) == smollm2(num_layers=2)  # what is left is dense
    assert smollm2().keep_layers([3, 7]) == smollm2(num_layers=2)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"moe_router_topk": 5}, "moe_router_topk is 5 of 4 experts; the nearest legal one is 4"),
        ({"moe_layer_freq": (1, 0)}, "a 0 or 1 for each of the 6 layers"),
        ({"moe_layer_freq": (0,) * 6}, "at least one 1"),
        ({"moe_layer_freq": 0}, "moe_layer_freq is 0"),
        ({"num_moe_experts": 2.5}, "num_moe_experts is 2.5; it must be a whole number"),
        ({"num_moe_experts": None}, "moe_ffn_hidden_size is 320, which needs num_moe_experts"),
        ({"moe_shared_expert_intermediate_size": None}, "there is no shared expert"),
        ({"mlp_bias": True}, "biases"),
    ],
)
def test_illegal_mixtures(sizes, message):
    with pytest.raises(InputError, match=message):
        mixed(**sizes)


def test_mixtures_as_plain_values():
    import json

    assert Architecture.from_dict(json.loads(json.dumps(mixed().as_dict()))) == mixed()
    assert not [name for name in smollm2().as_dict() if "moe" in name]  # files and digests of dense models stay
