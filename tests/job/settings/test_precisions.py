"""Precisions of a recipe: what is legal, and which sizes FP8 wants."""

import json

import pytest
from pico import SIZES
from test_architecture import mixed, smollm2

from nemo_minitron.costs import parameters_by_stage, training_memory
from nemo_minitron.errors import InputError
from nemo_minitron.job import Data, Job, Layout
from nemo_minitron.job.dry_run import check
from nemo_minitron.job.settings.fp8 import check_fp8
from nemo_minitron.job.settings.precision import settled
from nemo_minitron.precisions import FP8, PRECISIONS


@pytest.fixture
def job(tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **SIZES}))
    return Job(name="pico", teacher=str(teacher), data=Data("train.jsonl", "test.jsonl"), keep={"ffn": 64})


def test_each_has_its_own(job):
    settings = ["calibration.precision=fp8-current", "distillation.precision=fp8-delayed"]
    chosen = settled(job.override([*settings, "distillation.teacher_precision=fp8-blockwise"]))
    assert chosen.calibration.precision == "fp8-current"
    assert chosen.distillation.precision == "fp8-delayed"
    assert chosen.distillation.teacher_precision == "fp8-blockwise"
    assert {"fp32", "bf16", "fp8-delayed", "fp8-current", "fp8-blockwise"} == set(PRECISIONS)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("calibration.precision=fp8", "precision 'fp8' is unknown"),
        ("evaluation.precision=fp8-current", "precision 'fp8-current' is unknown; legal are: auto, bf16, fp32"),
        ("distillation.teacher_precision=fp8-curent", "did you mean 'fp8-current'"),
    ],
)
def test_unknown_ones_are_refused(job, setting, words):
    with pytest.raises(InputError, match=words):
        settled(job.override([setting]))


def test_sizes_that_fp8_cannot_multiply_are_refused():
    a = smollm2(ffn_hidden_size=1000)
    check_fp8(a, Layout(), "bf16")
    check_fp8(smollm2(), Layout(tp=3), "fp8-current")
    with pytest.raises(InputError, match=r"ffn=1000 is not legal in fp8-delayed at tp=1.*nearest legal size is 992"):
        check_fp8(a, Layout(), "fp8-delayed")
    with pytest.raises(InputError, match=r"ffn=1024 .*at tp=3.*nearest legal size is 1008"):
        check_fp8(smollm2(ffn_hidden_size=1024), Layout(tp=3), "fp8-current")  # 341 a rank
    with pytest.raises(InputError, match=r"hidden=450 .*nearest legal size is 448"):
        check_fp8(smollm2(hidden_size=450), Layout(), "fp8-current")


def test_a_plan_that_fp8_cannot_train_is_refused_before_it_starts(job):
    training = job.override(["distillation.precision=fp8-current", "keep.ffn=56"])
    with pytest.raises(InputError, match=r"ffn=56 is not legal in fp8-current.*nearest legal size is 64"):
        check(training)
    check(job.override(["keep.ffn=56"]))


def test_memory_of_fp8_training():
    """bf16 weights, two FP8 copies of the student's matrices, one of the teacher's; embeddings and norms have none."""
    a = smollm2()
    matrices = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    settings = {"batch": 1, "context": 16, "teacher": a}
    wide = training_memory(a, Layout(), **settings)
    both = training_memory(a, Layout(), precision="fp8-current", **settings)
    teacher = training_memory(a, Layout(), teacher_precision="fp8-blockwise", **settings)
    assert both["weights"] - wide["weights"] == 2 * matrices
    assert both["teacher"] - wide["teacher"] == teacher["teacher"] - wide["teacher"] == matrices
    assert teacher["weights"] == wide["weights"] == 2 * sum(parameters_by_stage(a, Layout())[0])
    assert {both[name] for name in ("gradients", "optimizer")} == {wide[name] for name in ("gradients", "optimizer")}


@pytest.mark.parametrize("precision", list(FP8))
def test_experts_have_their_own_tensor_parallelism(precision):
    a = mixed(moe_ffn_hidden_size=48)
    check_fp8(a, Layout(), precision)
    with pytest.raises(InputError, match=r"expert_ffn=48 .*at tp=2"):
        check_fp8(a, Layout(etp=2), precision)
