"""`minitron compress` of a pico Qwen2-MoE on Megatron-Bridge whose dropped experts are merged into kept ones, from the
folder to the student.
"""

import csv
import json

import numpy as np
import pytest
from command_line import TEXTS, minitron
from pico import pico_qwen2_moe, raw_tensors
from tolerances import LOGITS_PICO_FP32
from words import save_tokenizer

from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.families import from_hf
from nemo_minitron.pruning import HFSource
from nemo_minitron.pruning.merging import merge_experts

pytestmark = [pytest.mark.slow, pytest.mark.bridge]
DENSE, STEPS = 1, 6
SIZES = {"num_hidden_layers": 3, "num_experts": 6, "mlp_only_layers": [DENSE], "vocab_size": 509}
RECIPE = {
    "name": "pico",
    "teacher": "teacher",
    "data": {"train": "corpus.jsonl", "test": "corpus.jsonl"},
    "keep": {"experts": 4, "shared_expert_ffn": 48, "ffn": 80},
    "cutting": {"merge_experts": True},
    "calibration": {"samples": 4, "sequence_length": 36, "batch_size": 2},
    "distillation": {
        "tokens": 36 * 2 * STEPS, "sequence_length": 36, "global_batch_size": 2, "micro_batch_size": 1,
        "learning_rate": 0.0002, "warmup_steps": 1, "precision": "fp32",
    },
    "evaluation": {"tokens": 256, "sequence_length": 32, "precision": "fp32", "prompts": ["the"], "new_tokens": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    save_tokenizer(pico_qwen2_moe(folder / "teacher", **SIZES), TEXTS, 509)
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[:120]))
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    minitron(folder, "compress", "recipe.json", "--out", "run")
    return folder


def experts_of(layer, tensors):
    prefix = f"model.layers.{layer}.mlp.experts."
    return {name.removeprefix(prefix): tensor.view("f4") for name, tensor in tensors.items() if name.startswith(prefix)}


def test_dropped_experts_are_averaged_into_kept_ones(job):
    """As the job's own plan and scores say: a kept expert that none joins is the teacher's, bit for bit; the rows of
    the router and the shared expert's neurons are the teacher's, too."""
    plan, teacher = PrunePlan.load(job / "run" / "plan.json"), raw_tensors(job / "teacher")
    merged = merge_experts(HFSource(job / "teacher"), plan, Scores.load(job / "run" / "scores.safetensors"))
    note = json.loads((job / "run" / "checkpoints" / "pruned" / "minitron_compensation.json").read_text())
    assert note["merged experts"] == merged.described()
    pruned = raw_tensors(job / "run" / "checkpoints" / "pruned")
    for layer in (0, 2):
        kept, joined = plan.keep["experts"][layer], merged.described()[str(layer)]
        assert sorted([*kept, *(e for members in joined.values() for e in members)]) == list(range(6))
        before, after = experts_of(layer, teacher), experts_of(layer, pruned)
        for place, expert in enumerate(kept):
            for name in ("gate", "up", "down"):
                found, own = (part[f"{e}.{name}_proj.weight"] for part, e in ((after, place), (before, expert)))
                canonical = f"layers.{layer}.experts.{place}.{name}.weight"
                assert np.array_equal(found, merged[canonical] if str(expert) in joined else own), canonical
                assert np.array_equal(found, own) == (str(expert) not in joined)
        mlp, neurons = f"model.layers.{layer}.mlp.", plan.keep["shared_expert_ffn"][layer]
        assert np.array_equal(pruned[f"{mlp}gate.weight"], teacher[f"{mlp}gate.weight"][kept])
        shared = f"{mlp}shared_expert.up_proj.weight"
        assert np.array_equal(pruned[shared], teacher[shared][neurons])


def test_the_student_is_the_planned_one_and_every_tensor_was_trained(job):
    plan, student = PrunePlan.load(job / "run" / "plan.json"), from_hf(job / "run" / "student")
    assert student == plan.target
    assert (student.num_moe_experts, student.moe_shared_expert_intermediate_size, student.ffn_hidden_size) == (
        4,
        48,
        80,
    )
    assert student.dense_layers == (DENSE,)
    start, end = (raw_tensors(job / "run" / name) for name in ("checkpoints/pruned", "student"))
    assert start.keys() == end.keys()
    assert [name for name in end if np.array_equal(start[name], end[name])] == []
    rows = list(csv.DictReader((job / "run" / "checkpoints" / "distilled" / "loss.csv").open()))
    assert len(rows) == STEPS
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])


def test_gates_and_card(job):
    found = {gate["name"]: gate for gate in json.loads((job / "run" / "gates.json").read_text())["gates"]}
    same = ("teacher in ranked order", "student that keeps everything", "slices are masks")
    assert [found[name]["state"] for name in same] == ["passed"] * 3
    card = (job / "run" / "student" / "README.md").read_text()
    assert "| experts | 6 | 4 |" in card


def test_transformers_and_megatron_run_the_student_alike(job):
    """transformers' own loss on the first windows of the text is the evaluation's, and Megatron has its logits."""
    import torch
    from transformers import AutoModelForCausalLM
    from workers import load_model

    import nemo_minitron.backend as backend

    backend.setup()
    tokens = torch.from_numpy(np.fromfile(job / "run" / "data" / "train.bin", np.uint16)[:256].astype(int)).view(8, 32)
    (live,) = load_model(job / "run" / "student")
    with torch.no_grad():
        model, report = AutoModelForCausalLM.from_pretrained(
            job / "run" / "student", dtype=torch.float32, output_loading_info=True
        )
        expected = model.eval()(tokens, labels=tokens)
        places = torch.arange(32).expand_as(tokens)
        found = live.eval()(input_ids=tokens, position_ids=places, attention_mask=None)[..., :509]
    assert not any(report.values()), report
    (own,) = (row for row in json.loads((job / "run" / "numbers.json").read_text()) if row["stage"] == "distilled")
    assert float(expected.loss) == pytest.approx(own["loss"], abs=LOGITS_PICO_FP32)
    assert expected.logits.std() > 0.1
    assert (found - expected.logits).abs().max() < LOGITS_PICO_FP32
