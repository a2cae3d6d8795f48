"""Configs of Arcee: its published size, its MLP of two matrices, NeMo's LlamaModel, and what is refused."""

import pytest
from pico import SIZES

from nemo_minitron.errors import InputError
from nemo_minitron.families import family_of, family_of_nemo, from_hf

CONFIG = SIZES | {"architectures": ["ArceeForCausalLM"], "model_type": "arcee"}
# layers, hidden, heads, groups, ffn, vocabulary -> transformers' count of these sizes
COUNTED = [
    ((36, 2560, 20, 4, 18_432, 128_004), 4_619_184_640),  # AFM-4.5B
    ((32, 2560, 32, 32, 18_432, 32_000), 4_022_766_080),  # the defaults of ArceeConfig
]


@pytest.mark.parametrize(("sizes", "count"), COUNTED)
def test_published_size(sizes, count):
    layers, hidden, heads, groups, ffn, vocabulary = sizes
    fields = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    fields |= {"num_key_value_heads": groups, "intermediate_size": ffn, "vocab_size": vocabulary}
    fields |= {"head_dim": 128 if heads == 20 else None}
    assert from_hf(CONFIG | fields).parameters() == count


def test_the_mlp_has_two_matrices():
    architecture = from_hf(CONFIG)
    assert not architecture.gated_mlp
    assert "layers.0.gate.weight" not in architecture.shapes()
    matrices = architecture.parameters() - 509 * 48 - 48 * 13  # all but the embedding and the norms
    assert architecture.flops_per_token(6) == 2 * (matrices + 2 * 6 * 48 * 6)


def test_a_nemo_checkpoint_is_a_llama_without_a_gate():
    family, (name, fields) = family_of(CONFIG), family_of(CONFIG).nemo_config(CONFIG)
    assert (name, fields["gated_linear_unit"], fields["bias_activation_fusion"]) == ("LlamaConfig", False, False)
    assert fields["activation_func"].endswith("squared_relu")
    assert family_of_nemo("LlamaModel", fields) is family
    found = family.from_nemo(fields)
    assert (found["hidden_act"], found["architectures"]) == ("relu2", ["ArceeForCausalLM"])
    with pytest.raises(InputError, match="gated_linear_unit is True; a ArceeForCausalLM needs False"):
        family.from_nemo(fields | {"gated_linear_unit": True})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_bias": True}, "this ArceeForCausalLM has them in attention alone"),
        ({"mlp_bias": True}, "this ArceeForCausalLM has them in the MLP alone"),
        ({"hidden_act": "relu3"}, "hidden_act 'relu3' is unknown"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 20.0}}, "rope_scaling 'longrope' is not supported"),
    ],
)
def test_refused_by_name(fields, message):
    with pytest.raises(InputError, match=message):
        family_of(CONFIG).nemo_config(CONFIG | fields)
