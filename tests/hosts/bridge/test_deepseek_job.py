"""`minitron compress` of a pico DeepSeek V3 with router groups on Megatron-Bridge, from the folder to the student."""

import csv
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
from command_line import TEXTS, losses, minitron, start
from pico import pico_deepseek_v3, raw_tensors
from tolerances import LOGITS_PICO_FP32
from words import save_tokenizer

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.families import from_hf
from nemo_minitron.sources.bridge_config import TRACKER

pytestmark = [pytest.mark.slow, pytest.mark.bridge]
SIZES = {"num_hidden_layers": 3, "n_routed_experts": 12, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 4}
STEPS = 4
KEEP = {"experts": 9, "q_latent": 16, "kv_latent": 14, "ffn": 80}
RECIPE = {
    "name": "pico",
    "teacher": "teacher",
    "data": {"train": "corpus.jsonl", "test": "corpus.jsonl"},
    "keep": KEEP,
    "calibration": {"samples": 4, "sequence_length": 36, "batch_size": 2},
    "distillation": {
        "tokens": 288, "sequence_length": 36, "global_batch_size": 2, "micro_batch_size": 1, "learning_rate": 0.001,
        "warmup_steps": 1, "precision": "fp32", "save_every": 1,
    },
    "evaluation": {"tokens": 256, "sequence_length": 32, "precision": "fp32", "prompts": ["the"], "new_tokens": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    save_tokenizer(pico_deepseek_v3(folder / "teacher", **SIZES), TEXTS, 509)
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[:120]))
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    minitron(folder, "compress", "recipe.json", "--out", "run")
    return folder


def test_the_student_is_the_planned_one(job):
    """Each router group keeps three of its four experts, in every mixture."""
    plan, student = PrunePlan.load(job / "run" / "plan.json"), from_hf(job / "run" / "student")
    assert student == plan.target
    assert (student.num_moe_experts, student.moe_router_num_groups, student.ffn_hidden_size) == (9, 3, 80)
    assert (student.q_lora_rank, student.kv_lora_rank) == (16, 14)
    for layer in (1, 2):
        assert np.bincount([expert // 4 for expert in plan.keep["experts"][layer]]).tolist() == [3, 3, 3]


def test_every_tensor_is_trained_but_the_correction_biases(job):
    start, end = (raw_tensors(job / "run" / name) for name in ("checkpoints/pruned", "student"))
    same = [name for name in end if np.array_equal(start[name], end[name])]
    assert start.keys() == end.keys()
    assert same == [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)]
    rows = list(csv.DictReader((job / "run" / "checkpoints" / "distilled" / "loss.csv").open()))
    assert len(rows) == STEPS
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])


def test_killed_in_distillation_it_goes_on_to_the_same_bits(job):
    """SIGKILL to the whole session after the first checkpoint: every tensor, the correction biases among them, and the
    loss of every step are those of the run that was not killed."""
    killed = job / "killed"
    shutil.copytree(job / "run", killed)
    for made in (killed / "checkpoints" / "distilled", killed / "student"):
        shutil.rmtree(made)
    process = start(job, "compress", "recipe.json", "--out", "killed")
    training, deadline = killed / "checkpoints" / "distilled", time.monotonic() + 300
    while not (tracker := training / "bridge" / "checkpoints" / TRACKER).is_file():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stdout.read()[-4000:]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 1 <= int(tracker.read_text()) < STEPS
    log = training / "loss.csv"
    rows = log.read_text().splitlines()
    log.write_text("\n".join([rows[0], rows[1].rsplit(",", 1)[0] + ",1234.50", *rows[2:]]) + "\n")
    assert not (killed / "student").exists()
    assert "estimate: done before, skipped" in minitron(job, "compress", "recipe.json", "--out", "killed")
    assert log.read_text().splitlines()[1].endswith(",1234.50")  # this row was kept, so it did not begin again
    whole, resumed = (raw_tensors(folder / "student") for folder in (job / "run", killed))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not np.array_equal(whole[name], resumed[name])] == []
    assert losses(log) == losses(job / "run" / "checkpoints" / "distilled" / "loss.csv")


def test_gates_numbers_and_card(job):
    found = {gate["name"]: gate for gate in json.loads((job / "run" / "gates.json").read_text())["gates"]}
    same = ("teacher in ranked order", "student that keeps everything", "slices are masks")
    assert [found[name]["state"] for name in same] == ["passed"] * 3
    stages = [row["stage"] for row in json.loads((job / "run" / "numbers.json").read_text())]
    assert {"teacher", "random", "pruned", "distilled"} <= {*stages}
    card = (job / "run" / "student" / "README.md").read_text()
    for row in ("experts | 12 | 9", "latent of keys and values | 18 | 14", "latent of queries | 20 | 16"):
        assert f"| {row} |" in card


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
        expected = AutoModelForCausalLM.from_pretrained(job / "run" / "student", dtype=torch.float32).eval()(
            tokens, labels=tokens
        )
        places = torch.arange(32).expand_as(tokens)
        found = live.eval()(input_ids=tokens, position_ids=places, attention_mask=None)[..., :509]
    (own,) = (row for row in json.loads((job / "run" / "numbers.json").read_text()) if row["stage"] == "distilled")
    assert float(expected.loss) == pytest.approx(own["loss"], abs=LOGITS_PICO_FP32)
    assert expected.logits.std() > 0.1
    assert (found - expected.logits).abs().max() < LOGITS_PICO_FP32
