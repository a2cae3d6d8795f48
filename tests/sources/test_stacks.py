"""Stacks of experts: MXFP4 as transformers itself reads it, and students of it in bf16.

Mutations tried, each of which fails here: the upper four bits of a byte first; up before gate; exponents less 128.
"""

import json

import numpy as np
import pytest
import torch
from pico import pico_gpt_oss, raw_tensors
from safetensors.torch import load_file, save_file

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.model import load
from nemo_minitron.families import from_hf, read_config
from nemo_minitron.pruning import HFSource, prune
from nemo_minitron.pruning.convert import identity
from nemo_minitron.sources.stacks import claimed, joined, numbers

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
STACKS = {"gate_up_proj": (192, 2), "down_proj": (64, 3)}  # outputs, blocks of 32 inputs


def published(folder, low=118, high=131):
    """A gpt-oss in bf16 whose stacks of matrices are random MXFP4; (the folder, what transformers makes of it)."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    pico_gpt_oss(folder, dtype="bfloat16", **SIZES)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(3)
    expected = dict(tensors)
    for layer in range(2):
        for name, (outputs, blocks) in STACKS.items():
            stack = f"model.layers.{layer}.mlp.experts.{name}"
            del tensors[stack]
            packed = torch.randint(0, 256, (4, outputs, blocks, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(low, high, (4, outputs, blocks), dtype=torch.uint8, generator=generator)
            tensors[f"{stack}_blocks"], tensors[f"{stack}_scales"] = packed, scales
            expected[stack] = convert_moe_packed_tensors(packed, scales)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": MXFP4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, {name: tensor.contiguous().view(torch.int16).numpy() for name, tensor in expected.items()}


def test_every_number_is_transformers():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    scales = np.arange(255, dtype=np.uint8)[:, None]
    blocks = np.arange(16, dtype=np.uint8) * 17 ^ np.arange(255, dtype=np.uint8)[:, None, None]
    expected = convert_moe_packed_tensors(torch.from_numpy(blocks[None]), torch.from_numpy(scales[None]))
    found = numbers(blocks, scales)
    np.testing.assert_array_equal(found.T, expected[0].contiguous().view(torch.int16).numpy().view(np.uint16))
    assert len(np.unique(found)) > 1000


def test_a_published_folder_is_written_in_bf16(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    teacher, expected = published(tmp_path / "t")
    assert {HFSource(teacher).dtype(name) for name in HFSource(teacher).architecture.shapes()} == {"BF16"}
    student = prune(teacher, identity(from_hf(teacher)), tmp_path / "s")
    found = raw_tensors(student)
    assert found.keys() == expected.keys()
    for name, bits in expected.items():
        np.testing.assert_array_equal(found[name], bits.view(np.uint16), err_msg=name)
    assert "quantization_config" not in read_config(student)
    assert getattr(AutoConfig.from_pretrained(student), "quantization_config", None) is None
    _, report = AutoModelForCausalLM.from_pretrained(student, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        theirs, ours = (load(folder, "fp32")(torch.arange(40)[None]).logits for folder in (teacher, student))
    assert theirs.std() > 0.1
    assert torch.equal(theirs, ours)


def test_a_cut_reads_the_rows_that_stay(tmp_path):
    teacher, expected = published(tmp_path / "t")
    source = from_hf(teacher)
    hidden, experts = list(range(0, 64, 2)), {0: [1, 3], 1: [0, 2]}
    neurons = {n: {e: sorted((i * 7 + n + e) % 96 for i in range(40)) for e in kept} for n, kept in experts.items()}
    target = source.replace(hidden_size=32, num_moe_experts=2, moe_ffn_hidden_size=40)
    plan = PrunePlan(source, target, {"hidden": hidden, "experts": experts, "expert_ffn": neurons})
    found = raw_tensors(prune(teacher, plan, tmp_path / "s"))
    for layer, kept in experts.items():
        for at, expert in enumerate(kept):
            ffn = neurons[layer][expert]
            both = [2 * i + branch for i in ffn for branch in (0, 1)]
            name = f"model.layers.{layer}.mlp.experts."
            up, down = (expected[f"{name}{stack}"][expert].view(np.uint16) for stack in STACKS)
            np.testing.assert_array_equal(found[f"{name}gate_up_proj"][at], up[hidden][:, both])
            np.testing.assert_array_equal(found[f"{name}down_proj"][at], down[ffn][:, hidden])


def test_what_takes_turns():
    gate, up = np.arange(6).reshape(2, 3), 10 + np.arange(6).reshape(2, 3)
    assert joined([gate, up]).tolist() == [[0, 10, 3, 13], [1, 11, 4, 14], [2, 12, 5, 15]]
    assert joined([gate[:, 0], up[:, 0]]).tolist() == [0, 10, 3, 13]


def test_an_exponent_that_is_no_number_is_refused(tmp_path):
    teacher, _ = published(tmp_path / "t", low=255, high=256)
    with pytest.raises(InputError, match=r"layers\.\d\.experts\.\d\.\w+\.weight' hold a number that is not finite"):
        prune(teacher, identity(from_hf(teacher)), tmp_path / "s")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": None}, "lacks the tensor 'model.layers.0.mlp.experts.gate_up_proj' that its config"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq'; legal is 'mxfp4', or none"),
        ({"intermediate_size": 80}, "'model.layers.0.mlp.experts.gate_up_proj_blocks' in .* its config says"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(fields, message, tmp_path):
    folder, _ = published(tmp_path / "t")
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        HFSource(folder)


def test_inputs_that_fill_no_blocks_are_refused():
    with pytest.raises(InputError, match="'stack' in MXFP4 has 40 inputs; they must be a multiple of 32"):
        claimed("stack", ["a", "b"], 2, True, lambda *given: None, (1, 40, 64))


def test_plain_tensors_under_a_config_of_mxfp4_are_refused(tmp_path):
    folder = pico_gpt_oss(tmp_path / "t", **SIZES)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": MXFP4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"lacks the tensor .*gate_up_proj_blocks'"):
        HFSource(folder)
