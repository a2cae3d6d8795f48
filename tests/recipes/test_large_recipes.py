"""The large recipes at full size: as transformers and Megatron build them without memory, and what 80 GB hold."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pico import pico_llama
from test_architecture import of_table

from nemo_minitron.cli.find import find, names
from nemo_minitron.errors import InputError
from nemo_minitron.families import to_hf
from nemo_minitron.job import Job
from nemo_minitron.job.chain import checked
from nemo_minitron.job.dry_run import check, training_memory
from nemo_minitron.job.teacher import teacher_config
from nemo_minitron.search.sizes import student_architecture

WORKER = Path(__file__).parent / "recipes_worker.py"
H100 = 80e9  # bytes
RECIPES = {  # -> teacher and student of the papers, whose sizes test_architecture has
    "llama31_8b_to_4b_width": ("llama-3.1-8b", "llama-3.1-minitron-4b-width"),
    "llama31_8b_to_4b_depth": ("llama-3.1-8b", "llama-3.1-minitron-4b-depth"),
    "mistral_nemo_12b_to_8b": ("mistral-nemo-12b", "mn-minitron-8b"),
    "qwen3_8b_to_6b_width": ("qwen3-8b", "qwen3-6b-width"),
    "qwen3_8b_to_6b_depth": ("qwen3-8b", "qwen3-6b-depth"),
    "qwen3_30b_a3b_to_16b_experts": ("qwen3-30b-a3b", "qwen3-16b-experts"),
    "nemotron4_15b_to_8b_search": ("nemotron-4-15b", "minitron-8b"),  # the shape closest to the target
}
CHAIN = "nemotron4_15b_to_8b_to_4b"
HYBRID = "nemotron_nano_12b_to_9b"
GEMMA = "gemma3_4b_to_3b_width"
COUNTS = [12_310_001_152, 8_888_227_328]  # parameters of the published checkpoints' tensors
PATTERN = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"  # of the published student


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """Nothing in the hub's cache, whoever runs the tests."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-cache"))


@pytest.mark.parametrize("name", RECIPES)
def test_the_student_is_the_published_one_and_fits(name):
    job = find(name)
    assert name in names()
    assert Job.from_dict(json.loads(json.dumps(job.as_dict()))) == job
    teacher, student = check(job, offline=True)
    assert (teacher, student) == tuple(of_table(model) for model in RECIPES[name])
    layout, why = job.layout.for_student(student, teacher)
    assert (layout, why) == (job.layout, "")  # no retreat to another TP
    assert fits(student, teacher, job.distillation, layout)
    corrected = dataclasses.replace(job.distillation, correction_tokens=1)  # where none is meant, it may yet be set
    assert fits(teacher, teacher, corrected.correction(), layout)


def test_the_chain_ends_at_the_published_student_and_keeps_its_teacher(tmp_path):
    job = find(CHAIN)
    first, second = checked(job, tmp_path, offline=True)
    models = [of_table(name) for name in ("nemotron-4-15b", "minitron-8b", "minitron-4b")]
    assert [first.source, first.target, second.target] == models
    assert second.source == models[1]
    assert second.job.learns_from == job.teacher
    for student, step in ((models[1], first.job), (models[2], second.job)):
        assert step.layout.for_student(student, models[0]) == (job.layout, "")
        assert fits(student, models[0], step.distillation, step.layout)


@pytest.fixture
def on_bridge(monkeypatch):
    """The host that has hybrids; it need not be installed to plan a job."""
    monkeypatch.setenv("MINITRON_HOST", "bridge")


def test_the_hybrids_student_is_the_published_one_and_fits(on_bridge):
    job = find(HYBRID)
    teacher, student = check(job, offline=True)
    assert [teacher.parameters(), student.parameters()] == COUNTS
    assert (student.hybrid_pattern, student.hidden_size, student.ffn_hidden_size) == (PATTERN, 4480, 15680)
    numbers = {"mamba_layers": 27, "attention_layers": 4, "mlp_layers": 25}
    assert student_architecture(teacher, {**numbers, "hidden": 4480, "ffn": 15680}).parameters() == COUNTS[1]
    assert job.layout.for_student(student, teacher) == (job.layout, "")
    assert fits(student, teacher, job.distillation, job.layout)
    assert fits(teacher, teacher, job.distillation.correction(), job.layout)


def test_gemma_is_cut_by_width_and_fits(on_bridge):
    job = find(GEMMA)
    teacher, student = check(job, offline=True)
    assert [teacher.parameters(), student.parameters()] == [3_880_263_168, 3_010_942_208]
    assert (student.hidden_size, student.ffn_hidden_size) == (2304, 8192)
    assert job.layout.for_student(student, teacher) == (job.layout, "")
    assert fits(student, teacher, job.distillation, job.layout)
    assert fits(teacher, teacher, job.distillation.correction(), job.layout)


def test_transformers_builds_as_many_parameters_of_gemma(on_bridge):
    test_transformers_builds_as_many_parameters(GEMMA)


@pytest.mark.bridge
def test_transformers_builds_as_many_parameters_of_the_hybrid(on_bridge):
    test_transformers_builds_as_many_parameters(HYBRID)


def fits(student, teacher, settings, layout):
    return sum(training_memory(student, teacher, settings, layout).values()) < H100


def test_the_search_goes_through_the_papers_space():
    job = find("nemotron4_15b_to_8b_search")
    assert job.search.describe(of_table("nemotron-4-15b"), {}).startswith("160 shapes, 20 with")


# 6,144 experts take transformers 15 s; tests/families/test_qwen3_moe.py counts pico mixtures
@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"qwen3_30b_a3b_to_16b_experts"}))
def test_transformers_builds_as_many_parameters(name):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    job = find(name)
    for architecture in check(job, offline=True):
        config = to_hf(architecture, job.teacher_config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
        assert model.num_parameters() == architecture.parameters()


@pytest.mark.slow
def test_megatron_builds_each_rank_as_counted(on_bridge):
    """Both models of each recipe on one rank of its 256: tensor-parallel shards, of equal size on every rank.

    All but Gemma, of which bare Megatron has only two of the four norms."""
    cases = {name: [find(name), check(find(name), offline=True)] for name in [*RECIPES, HYBRID]}
    cases[CHAIN] = [find(CHAIN), [of_table("minitron-8b"), of_table("minitron-4b")]]
    given = {n: [[dataclasses.asdict(job.layout), a.as_dict()] for a in pair] for n, (job, pair) in cases.items()}
    environment = os.environ | {"PYTHONPATH": str(WORKER.parents[1])}
    command = [sys.executable, str(WORKER), json.dumps(given)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {*RECIPES, HYBRID, CHAIN}
    for name, models in found.items():
        for (held, counted), architecture in zip(models, cases[name][1], strict=True):
            assert held == counted
            layout = cases[name][0].layout
            assert held > architecture.parameters() // (layout.tp * layout.ep)  # norms are on every rank


def test_the_dry_run_tells_tokens_steps_and_gpu_hours_and_loads_nothing(tmp_path):
    code = (
        "import sys, nemo_minitron.cli as cli\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'torch', 'nemo', 'transformers', 'megatron'} & sys.modules.keys()"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", code, "compress", "llama31_8b_to_4b_width", "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "9960 steps, 93,994,352,640 tokens, forward_kl, bf16, the teacher in fp8-current" in done.stdout
    assert "GPU-hours: 6,802.4, 26.6 h on 256 GPUs" in done.stdout
    assert "at 989 TFLOPS (H100, bf16) and an assumed MFU of 40%" in done.stdout
    assert "the teacher is not on this machine" in done.stdout


def test_a_teacher_of_another_architecture_is_refused(tmp_path):
    job = dataclasses.replace(find("llama31_8b_to_4b_width"), teacher=str(pico_llama(tmp_path / "pico")))
    words = "has num_layers 6, but the recipe llama31_8b_to_4b_width is for one with 32"
    for offline in (True, False):
        with pytest.raises(InputError, match=words):
            teacher_config(job, offline=offline)


def test_a_student_that_the_host_cannot_build_is_refused_before_it_is_scored():
    job = find("qwen3_30b_a3b_to_16b_experts")
    fewer = [dataclasses.replace(job, keep=job.keep | {"experts_per_token": number}) for number in (4, 1)]
    assert check(fewer[0], offline=True)[1] == check(job, offline=True)[1].replace(moe_router_topk=4)
    with pytest.raises(InputError, match=r"num_experts_per_tok is 1 and the router normalizes.* nearest legal .* is 2"):
        check(fewer[1], offline=True)


def test_without_the_teacher_only_the_dry_run_goes_on(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    job = find("qwen3_8b_to_6b_depth")
    with pytest.raises(InputError, match="'Qwen/Qwen3-8B' is neither a folder here nor a model that the hub"):
        check(job)
