"""Precisions of a recipe: what is legal, and which sizes FP8 wants."""

import json
from pathlib import Path

import pytest
from pico import SIZES
from test_architecture import mixed, smollm2

from nemo_minitron.costs import parameters_by_stage, training_memory
from nemo_minitron.errors import InputError
from nemo_minitron.job import Data, Job, Layout
from nemo_minitron.job.dry_run import check
from nemo_minitron.precisions import FP8, PRECISIONS, token_multiple
from nemo_minitron.settings.fp8 import check_fp8, check_tokens
from nemo_minitron.settings.precision import with_resolved_precisions


@pytest.fixture
def job(tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **SIZES}))
    return Job(name="pico", teacher=str(teacher), data=Data("train.jsonl", "test.jsonl"), keep={"ffn": 64})


def test_each_has_its_own(job):
    settings = ["calibration.precision=fp8-current", "distillation.precision=fp8-delayed"]
    chosen = with_resolved_precisions(job.override([*settings, "distillation.teacher_precision=fp8-blockwise"]))
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
        with_resolved_precisions(job.override([setting]))


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


def test_tokens_that_fp8_cannot_multiply_are_refused(job):
    for length, rows, precision in ((48, 1, "fp8-current"), (24, 2, "fp8-delayed"), (20, 4, "fp8-blockwise")):
        check_tokens(length, rows, Layout(), precision, "bf16")
        with pytest.raises(InputError, match=rf"micro-batches of {rows} x {length + 1} tokens .*length is {length}"):
            check_tokens(length + 1, rows, Layout(), "bf16", precision)
    check_tokens(37, 1, Layout(), "fp32", "bf16")
    with pytest.raises(InputError, match="must be a multiple of 32; the nearest legal length is 64"):
        check_tokens(48, 1, Layout(cp=2), "fp8-current")
    with pytest.raises(InputError, match="must be a multiple of 256; the nearest legal length is 512"):
        check_tokens(496, 1, Layout(tp=2, sp=True), "fp8-blockwise")
    wide = {"architectures": ["LlamaForCausalLM"], **SIZES, "head_dim": 16}
    Path(job.teacher, "config.json").write_text(json.dumps(wide))
    for settings in (["calibration.precision=fp8-current", "calibration.sequence_length=36"],
                     ["distillation.precision=fp8-delayed", "distillation.sequence_length=36"],
                     ["distillation.teacher_precision=fp8-current", "distillation.sequence_length=36"]):  # fmt: skip
        with pytest.raises(InputError, match=r"1 x 36 tokens are not legal in fp8-.*nearest legal length is 32"):
            check(job.override([*settings, "calibration.batch_size=1", "distillation.micro_batch_size=1"]))


def test_multiples_of_tokens():
    """16 as a weight's gradient sums over them; of each part 8, or a block."""
    assert [token_multiple(recipe) for recipe in (None, *FP8.values())] == [1, 16, 16, 16]
    assert [token_multiple("tensorwise", parts) for parts in (1, 2, 3, 4)] == [16, 16, 48, 32]
    assert [token_multiple("blockwise", parts) for parts in (1, 2, 3)] == [16, 256, 384]


def test_blocks_want_whole_ones_where_a_sequence_is_gathered():
    for layout, precision in ((Layout(tp=3), "fp8-blockwise"), (Layout(tp=3, sp=True), "fp8-current")):
        check_fp8(smollm2(), layout, precision)
    with pytest.raises(InputError, match=r"hidden=576 is not legal in fp8-blockwise under sequence.*512, or sp=false"):
        check_fp8(smollm2(), Layout(tp=3, sp=True), "fp8-blockwise")


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
