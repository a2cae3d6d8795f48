"""Sizes against the published models (MINITRON.md, section 5) and against transformers' own count."""

import dataclasses
import math

import pytest

from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import InputError

NEMOTRON = {"gated_mlp": False, "normalization": "layernorm"}
QWEN3 = {"qk_norm": True}
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
}
EXACT = {"llama-3.1-8b": 8_030_261_248, "mistral-nemo-12b": 12_247_782_400, "qwen3-8b": 8_190_735_360}


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
    assert dataclasses.asdict(architecture) == architecture.as_dict()
    with pytest.raises(InputError, match="no field 'num_layer'; did you mean 'num_layers'"):
        Architecture.from_dict(architecture.as_dict() | {"num_layer": 3})
    values = architecture.as_dict()
    del values["head_dim"]
    with pytest.raises(InputError, match="needs head_dim"):
        Architecture.from_dict(values)
