"""Configs of Nemotron-H and Nano v2: published sizes, both names of the pattern, its tensors, and what is refused."""

import math

import numpy as np
import pytest
from pico import SIZES

from nemo_minitron.errors import InputError
from nemo_minitron.families import check_host, family_of, from_hf, to_hf, written_config
from nemo_minitron.families.bridge import bridge_fields
from nemo_minitron.sources.bridge_config import config_of_model

LEFT_OUT = ("rms_norm_eps", "rope_theta", "num_hidden_layers")
MAMBA = {"mamba_num_heads": 8, "mamba_head_dim": 6, "n_groups": 2, "ssm_state_size": 5, "conv_kernel": 4}
CONFIG = {name: value for name, value in SIZES.items() if name not in LEFT_OUT} | MAMBA
CONFIG |= {"architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-M"}
BLOCKS = ["mamba", "mlp", "mamba", "attention", "mlp", "mamba"]
NANO = {  # name -> pattern, hidden, ffn, parameters of the published checkpoint's tensors
    "12B": ("M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-", 5120, 20480, 12_310_001_152),
    "9B": ("M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", 4480, 15680, 8_888_227_328),
}


def nano(name):
    pattern, hidden, ffn, _ = NANO[name]
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "hybrid_override_pattern": pattern}
    sizes |= {"num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131_072}
    return CONFIG | sizes | {"mamba_num_heads": 128, "mamba_head_dim": 80, "n_groups": 8, "ssm_state_size": 128}


@pytest.mark.parametrize("name", NANO)
def test_published_sizes(name):
    assert from_hf(nano(name)).parameters() == NANO[name][3]


def test_the_published_cut_of_12b_to_9b():
    """Its pattern is a part of the teacher's: six layers go."""
    from nemo_minitron.search.sizes import student_architecture

    teacher, student = from_hf(nano("12B")), from_hf(nano("9B"))
    left, layers = iter(enumerate(teacher.hybrid_pattern)), []
    for symbol in student.hybrid_pattern:
        layers.append(next(layer for layer, other in left if other == symbol))
    keep = {"layers": layers, "hidden": 4480, "ffn": 15680}
    assert student_architecture(teacher, keep) == student
    assert (len(layers), student_architecture(teacher, keep).parameters()) == (56, NANO["9B"][3])
    with pytest.raises(InputError, match="not all of one kind; list the layers that stay"):
        student_architecture(teacher, {"layers": 56})


def test_a_layer_is_one_of_three_kinds():
    architecture = from_hf(CONFIG)
    assert architecture.mamba_layers == (0, 2, 5)
    assert (architecture.attention_layers, architecture.dense_layers) == ((3,), (1, 4))
    norms = [name for name in architecture.shapes() if name.endswith("input_norm.weight")]
    assert len(norms) == 6
    assert not any("pre_mlp_norm" in name for name in architecture.shapes())
    assert from_hf(CONFIG).from_dict(architecture.as_dict()) == architecture
    assert architecture.keep_layers([0, 3, 4]).hybrid_pattern == "M*-"


def test_cost_of_what_a_sequence_keeps():
    """Keys and values of the one attention layer; of each Mamba layer fp32 states and four positions of x | B | C."""
    architecture = from_hf(CONFIG)
    size = architecture.memory(batch=3, context=7) - architecture.memory(batch=1, context=7)
    assert size == 2 * (2 * 3 * 8 * 7 * 2 + 3 * (48 * 5 * 4 + (48 + 20) * 4 * 2))


def test_both_names_of_the_pattern():
    newer = {name: value for name, value in CONFIG.items() if name != "hybrid_override_pattern"}
    assert from_hf(newer | {"layers_block_type": BLOCKS}) == from_hf(CONFIG)
    assert from_hf(CONFIG | {"layers_block_type": BLOCKS}) == from_hf(CONFIG)
    student = from_hf(CONFIG).keep_layers([0, 3, 4]).replace(hidden_size=40)
    written = written_config(to_hf(student, CONFIG, [0, 3, 4]))
    assert (written["hybrid_override_pattern"], written["num_hidden_layers"]) == ("M*-", 3)
    assert written["layers_block_type"] == ["mamba", "attention", "mlp"]
    assert from_hf(written) == student
    assert "rope_parameters" not in written


def test_bridges_fields():
    fields = bridge_fields(family_of(CONFIG), CONFIG)
    wanted = {
        "hybrid_layer_pattern": "M-M*-M",
        "mamba_num_groups": 2,
        "kv_channels": 8,
        "position_embedding_type": "none",
    }
    assert wanted.items() <= fields.items()


def test_what_a_checkpoint_of_bridges_says():
    """The fields that its provider was told, and those that it has by itself."""
    told = bridge_fields(family_of(CONFIG), CONFIG) | {
        "activation_func": "a.module.squared_relu",
        "qk_layernorm": False,
    }
    told |= {"share_embeddings_and_output_weights": False, "vocab_size": CONFIG["vocab_size"]}
    read = config_of_model(told | {"_target_": "megatron.bridge.models.hybrid.hybrid_provider.HybridModelProvider"})
    assert from_hf(read) == from_hf(CONFIG)
    assert (read["mlp_hidden_act"], read["chunk_size"], read["layers_block_type"]) == ("relu2", 128, BLOCKS)
    with pytest.raises(InputError, match="qk_layernorm is True; a NemotronHForCausalLM needs False"):
        family_of(CONFIG).from_nemo(told | {"qk_layernorm": True})


def test_the_input_projections_rows_are_in_their_order():
    names = family_of(CONFIG).hf_tensors(from_hf(CONFIG))
    assert names["backbone.layers.2.mixer.in_proj.weight"] == tuple(
        f"layers.2.{n}.weight" for n in ("z", "x", "b", "c", "dt")
    )
    rows = np.cumsum([from_hf(CONFIG).shapes()[n][0] for n in names["backbone.layers.2.mixer.in_proj.weight"]])
    assert rows.tolist() == [48, 96, 106, 116, 124]


def test_nemo_refuses_it_and_names_the_host_that_has_it():
    check_host(CONFIG, "bridge")
    with pytest.raises(InputError, match=r"is built by Megatron-Bridge, not by NeMo 2, .* give --host bridge"):
        check_host(CONFIG, "nemo")


@pytest.mark.parametrize("limit", [[0.0, math.inf], [0.0, {"__float__": "Infinity"}], None])
def test_the_limit_of_the_steps_that_megatron_has(limit):
    assert from_hf(CONFIG | {"time_step_limit": limit}) == from_hf(CONFIG)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hybrid_override_pattern": "MEM*"}, "hybrid_override_pattern is 'MEM\\*'; legal are the symbols M \\* -"),
        ({"hybrid_override_pattern": None}, "hybrid_override_pattern is None"),
        ({"layers_block_type": ["mamba", "moe"]}, "legal are mamba, attention, mlp in a list"),
        ({"layers_block_type": BLOCKS[:4]}, "is 'M-M\\*-M', and its layers_block_type say 'M-M\\*'"),
        ({"n_groups": 3}, "8 Mamba heads do not divide into 3 groups; the nearest legal number of heads is 9"),
        ({"conv_kernel": 3}, "conv_kernel is 3; a NemotronHForCausalLM here needs 4"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06; .* needs 1e-05"),
        ({"time_step_limit": [0.0, 0.1]}, "time_step_limit is .*; Megatron's mixer has 0 to infinity"),
        ({"time_step_limit": [0.01, math.inf]}, "time_step_limit is"),
        ({"use_bias": True}, "use_bias is True"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1; layers of multi-token prediction are not"),
        ({"residual_in_fp32": True}, "residual_in_fp32 is True"),
        ({"mamba_head_dim": None}, "has no 'mamba_head_dim'"),
    ],
)
def test_what_megatron_cannot_represent_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        from_hf(CONFIG | fields)
