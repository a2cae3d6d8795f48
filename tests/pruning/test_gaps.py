"""Behind dropped layers: what is written to the residual stream, scaled to the length that the stream has there."""

import json

import numpy as np
import pytest
from pico import (
    pico_gemma2,
    pico_gemma3_text,
    pico_gpt_oss,
    pico_granite,
    pico_llama,
    pico_mixtral,
    pico_nemotron,
    pico_qwen3,
    raw_tensors,
    save_tensors,
)
from plans_by_hand import width_and_depth
from test_architecture import mixed, smollm2
from test_axes import HYBRID
from tolerances import LOGITS_PICO_FP32

from nemo_minitron import hybrid
from nemo_minitron.artifacts import Compensation, PrunePlan, Scores
from nemo_minitron.artifacts.blocks import Gap
from nemo_minitron.artifacts.dtypes import as_numbers
from nemo_minitron.axes import split_expert, split_name
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.pruning import HFSource, prune
from nemo_minitron.pruning.gaps import filling, gap_scales, gaps, last_matrix, writes
from nemo_minitron.pruning.student import Student
from nemo_minitron.sources.tensors import whole

LOGS = np.array([-1.0, 0.5, 0.7, 0.4, 1.1, 2.0, 2.5], np.float32)  # of six layers; one shrinks the stream


def scores_of(architecture, logs=LOGS):
    return Scores(architecture, {"stream": logs})


def depth_plan(architecture, kept):
    return PrunePlan(architecture, architecture.keep_layers(kept), {"layers": kept})


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        (smollm2(num_layers=3), [None, "down.weight", "down.weight", "down.weight"]),
        (mixed(), [None, None, "down.weight", "down.weight", None, "down.weight", "down.weight"]),
        (HYBRID, [None, "out.weight", "o.weight", "down.weight", "out.weight"]),
        (HYBRID.replace(hybrid_pattern=None, **dict.fromkeys(hybrid.SIZES)).replace(post_norms=True), [None] * 5),
    ],
    ids=["dense", "mixtures", "hybrid", "post norms"],
)
def test_the_last_matrix_in_front_of_a_gap(architecture, expected):
    """Of a gap that starts with each layer, and of none for the first: the embedding is not changed."""
    gaps_at = [Gap(first, first + 1) for first in range(architecture.num_layers + 1)]
    assert [last_matrix(architecture, gap) for gap in gaps_at] == expected


def test_inputs_that_were_always_0_change_nothing():
    source = smollm2(num_layers=3, hidden_size=6, ffn_hidden_size=8, num_attention_heads=3, head_dim=2, vocab_size=11)
    plan = depth_plan(source, [0, 2])
    sums = np.zeros((8, 8 + 2 * 6))
    np.testing.assert_array_equal(filling(plan, "layers.0.down.weight", sums, 0.3), np.zeros((6, 8)))


@pytest.mark.parametrize(
    ("kept", "blocks", "exponents"),
    [
        ([0, 2, 5], [(1, 2), (3, 5)], [0, -0.2, -(0.2 + 1.6)]),
        ([0, 1, 4, 5], [(2, 4)], [0, 0, -0.4, -0.4]),
        ([2, 4], [(0, 2), (3, 4), (5, 6)], [-1.7, -1.7 - 0.7]),  # the stream in front is that of the embeddings
        ([0, 1, 2], [(3, 6)], [0, 0, 0]),  # nothing is kept behind the gap
    ],
)
def test_factors_by_hand(tmp_path, kept, blocks, exponents):
    architecture = from_hf(pico_llama(tmp_path / "t"))
    plan = depth_plan(architecture, kept)
    assert gaps(plan) == blocks
    scales = gap_scales(plan, scores_of(architecture))
    expected = {
        f"layers.{layer}.{name}.weight": np.exp(exponent)
        for layer, exponent in enumerate(exponents)
        for name in ("o", "down")
        if exponent
    }
    assert scales == pytest.approx(expected, rel=1e-6)


def uneven(folder):
    """Norms and biases of a random model that are all 1 or 0 would hide a factor on the wrong tensor."""
    generator = np.random.default_rng(5)
    tensors = {name: raw.view(np.float32) for name, raw in raw_tensors(folder).items()}
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            tensors[name] = (tensor + generator.normal(scale=0.2, size=tensor.shape)).astype(np.float32)
    save_tensors(folder, tensors)
    return folder


FAMILIES = {
    "llama with biases": (pico_llama, {"rms_norm_eps": 1e-12, "attention_bias": True, "mlp_bias": True}, 4),
    "tied": (pico_qwen3, {"rms_norm_eps": 1e-12, "tie_word_embeddings": True}, 2),
    "layernorm": (pico_nemotron, {"norm_eps": 1e-12, "attention_bias": True, "mlp_bias": True}, 4),
    "residual multiplier": (pico_granite, {"rms_norm_eps": 1e-12}, 2),
    "mixture": (pico_mixtral, {"rms_norm_eps": 1e-12}, 5),
    "mixture with biases": (pico_gpt_oss, {"rms_norm_eps": 1e-12}, 10),
    "norms behind": (pico_gemma2, {"rms_norm_eps": 1e-12}, 2),
    "norms behind, scaled embeddings": (pico_gemma3_text, {"rms_norm_eps": 1e-12}, 2),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_stream_times_a_at_the_gap(tmp_path, name):
    """The plain student, whose stream a hook multiplies at both gaps, has the logits of the scaled one: exact but for
    epsilon (made small here) and the rounding of the weights."""
    import torch
    from transformers import AutoModelForCausalLM

    family, options, writers = FAMILIES[name]
    teacher = uneven(family(tmp_path / "t", **options))
    plan = depth_plan(from_hf(teacher), [0, 2, 5])
    scales = gap_scales(plan, scores_of(plan.source))
    assert len(scales) == 2 * writers
    prune(teacher, plan, tmp_path / "plain")
    prune(teacher, plan, tmp_path / "scaled", compensation=Compensation(plan.digest, {}, scales=scales))
    tokens = torch.arange(3, 35)[None] * 13 % 509
    plain, scaled = (
        AutoModelForCausalLM.from_pretrained(tmp_path / n, attn_implementation="eager") for n in ("plain", "scaled")
    )
    with torch.no_grad():
        before, found = plain(tokens).logits, scaled(tokens).logits
        for layer, log in ((1, 0.2), (2, 1.6)):
            plain.model.layers[layer].register_forward_pre_hook(_multiplied(float(np.exp(log))), with_kwargs=True)
        expected = plain(tokens).logits
    assert (before - expected).abs().max() > 100 * LOGITS_PICO_FP32
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGITS_PICO_FP32)


def _multiplied(by):
    def hook(module, args, kwargs):
        if args:
            return (args[0] * by, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"] * by}

    return hook


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slices_and_solved_matrices_are_scaled_and_rounded_once(tmp_path, dtype):
    teacher = pico_llama(tmp_path / "t", dtype=dtype)
    source, plan = HFSource(teacher), width_and_depth(from_hf(teacher))
    solved = "layers.2.down.weight"
    values = np.random.default_rng(0).normal(size=plan.target.shapes()[solved]).astype(np.float32)
    scales = gap_scales(plan, scores_of(plan.source))
    assert solved in scales
    plain = Student(source, plan, Compensation(plan.digest, {solved: values}))
    Compensation(plan.digest, {solved: values}, scales=scales).save(tmp_path / "c")
    scaled = Student(source, plan, Compensation.load(tmp_path / "c"))
    prune(teacher, plan, tmp_path / "s", compensation=tmp_path / "c")
    written = HFSource(tmp_path / "s")
    for name, shape in plan.target.shapes().items():
        numbers = (
            values.astype(np.float64)
            if name == solved
            else as_numbers(plain.read(name, whole(shape)), source.dtype(name))
        )
        found = as_numbers(scaled.read(name, whole(shape)), source.dtype(name))
        half_ulp = (1 + 1e-6) * 2.0**-8 if dtype == "bfloat16" else 2.0**-24
        np.testing.assert_allclose(found, numbers * scales.get(name, 1.0), rtol=half_ulp, atol=0, err_msg=name)
        np.testing.assert_array_equal(written.read(name, whole(shape)), scaled.read(name, whole(shape)), strict=True)
    assert json.loads((tmp_path / "s" / "minitron_compensation.json").read_text())["tensors"] == [solved]


def test_what_is_refused(tmp_path):
    teacher = pico_llama(tmp_path / "t")
    architecture = from_hf(teacher)
    plan, width = depth_plan(architecture, [0, 2, 5]), PrunePlan(architecture, architecture, {})
    with pytest.raises(InputError, match="drops no layers"):
        gap_scales(width, scores_of(architecture))
    with pytest.raises(InputError, match="have no 'stream'"):
        gap_scales(plan, Scores(architecture, {"layers": np.ones(6, np.float32)}))
    with pytest.raises(InputError, match="another model"):
        gap_scales(plan, scores_of(architecture.replace(ffn_hidden_size=64)))
    for scale in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="above 0 and finite"):
            Compensation(plan.digest, {}, scales={"layers.1.o.weight": scale}).check(plan)
    with pytest.raises(InputError, match="does not have"):
        Compensation(plan.digest, {}, scales={"layers.3.o.weight": 1.0}).check(plan)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mlp_bias": True, "attention_output_bias": True}, {"o.weight", "o.bias", "down.weight", "down.bias"}),
        (
            {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 40,
             "moe_layer_freq": (0, 1, 1, 1, 1, 1), "moe_shared_expert_intermediate_size": 8},
            {"o.weight", "down.weight", "experts.{e}.down.weight", "shared_expert.down.weight"},
        ),
        (
            {"hybrid_pattern": "M*-M*-", "mamba_num_heads": 2, "mamba_head_dim": 3, "mamba_num_groups": 1,
             "mamba_state_dim": 4},
            {"out.weight", "o.weight", "down.weight"},
        ),
        ({"post_norms": True, "zero_centered_norms": True}, {"post_attention_norm.weight", "post_mlp_norm.weight"}),
    ],
)  # fmt: skip
def test_what_writes_to_the_stream(tmp_path, changes, expected):
    architecture = from_hf(pico_llama(tmp_path / "t")).replace(**changes)
    names = [name for name in architecture.shapes() if name.startswith("layers.") and writes(name, architecture)]
    assert {split_expert(split_name(name)[1])[1] for name in names} == expected
