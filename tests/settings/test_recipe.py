"""Recipes as plain values, overrides, layouts, and the dry run."""

import dataclasses
import json
import re

import pytest
import yaml
from pico import SIZES
from typer.testing import CliRunner

from nemo_minitron.architecture import Architecture
from nemo_minitron.cli import app
from nemo_minitron.cli.find import find, names
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.job import Data, Job, Layout
from nemo_minitron.job.dry_run import describe, fit_to_models
from nemo_minitron.search.sizes import target_of
from nemo_minitron.settings.precision import best_precision, with_resolved_precisions


@pytest.fixture
def job(tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **SIZES}))
    return Job(name="pico", teacher=str(teacher), data=Data("train.jsonl", "test.jsonl"), keep={"ffn": 64})


@pytest.mark.parametrize("name", ["smollm2_135m_to_108m_width", "smollm2_135m_to_113m_depth"])
def test_shipped_recipes_survive_json(name):
    assert name in names()
    recipe = find(name)
    assert recipe.name == name
    assert Job.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe


def test_overrides_reach_every_depth(job):
    changed = job.override(["distillation.tokens=2000", "keep.hidden=40", "layout.sp=true", "data.name=my text"])
    assert (changed.distillation.tokens, changed.layout.sp, changed.data.name) == (2000, True, "my text")
    assert changed.keep == {"ffn": 64, "hidden": 40}
    assert job.distillation.tokens != 2000


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("distillation.token=3", "no key 'distillation.token'.*did you mean 'distillation.tokens'"),
        ("tokens", "sets nothing; write key=value"),
        ("distillation=3", "is a group of settings"),
        ("distillation.tokens=many", "'distillation.tokens' is 'many'; it must be a whole number"),
        ("layout.sp=1", "'layout.sp' is 1; it must be true or false"),
        ("distillation.tokens=0", "tokens is 0; the nearest legal value is 1"),
        ("calibration.norms=al", "norms 'al' is unknown; did you mean 'all'"),
        ("distillation.loss=revers_kl", "loss 'revers_kl' is unknown; did you mean 'reverse_kl'"),
        ("calibration.batch_size=-4", "batch_size is -4; the nearest legal value is 1"),
        ("distillation.learning_rate=0", "learning_rate is 0.0; it must be above 0"),
        ("name=3", "'name' is 3; it must be a text"),
        ("a.b.c=3", "no key 'a.b.c'"),
    ],
)
def test_overrides_refused(job, setting, words):
    with pytest.raises(InputError, match=words):
        job.override([setting])


@pytest.mark.parametrize(
    ("flags", "precision"), [("flags : fpu avx2 avx512_bf16\n", "bf16"), ("flags : fpu avx2\n", "fp32")]
)
def test_auto_precision_goes_by_the_processor(flags, precision, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(flags)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert best_precision(tmp_path / "cpuinfo") == precision


def test_settled_recipes_have_no_auto(job):
    assert with_resolved_precisions(find(names()[0])).distillation.precision in ("fp32", "bf16")
    with pytest.raises(InputError, match="precision 'fp23' is unknown; did you mean 'fp32'"):
        with_resolved_precisions(job.override(["distillation.precision=fp23"]))


def test_a_recipe_must_be_whole(job):
    values = job.as_dict()
    del values["teacher"]
    with pytest.raises(InputError, match="lacks 'teacher'"):
        Job.from_dict(values)


@pytest.mark.parametrize(
    ("name", "words"), [("smollm2_135m_width", "did you mean 'smollm2_135m_to_"), ("x.py", "does not exist")]
)
def test_unknown_recipe(name, words):
    with pytest.raises(InputError, match=words):
        find(name)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def recipe(:", "fails in line 1: SyntaxError: invalid syntax"),
        ("import nothing_like_it", "fails in line 1: ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("x = 1\n\ndef recipe():\n    return {}['a']", "fails in line 4: KeyError: 'a'"),
        ("import json\njson.loads('{')", "fails in line 2: JSONDecodeError"),
        ("raise SystemExit(3)", "fails in line 1: SystemExit: 3"),
        ("def recipe():\n    assert 0", "fails in line 2: AssertionError"),
        ("a = 1", "has no function recipe"),
        ("def recipe():\n    return 3", "returns a int"),
        ("from nemo_minitron.job import *\ndef recipe(): return Job(3, 't', Data('a', 'b'), {})", "'name' is 3"),
        ("from nemo_minitron.job import *\ndef recipe(): return Job('n', 't', Data('a', 'b'), {1j: 2})", "TypeError"),
    ],
)
def test_whatever_a_recipe_does_is_one_sentence(body, words, tmp_path):
    """A list of exception types, as it was, lets KeyError, JSONDecodeError and SystemExit through."""
    (tmp_path / "mine.py").write_text(body)
    with pytest.raises(InputError, match=words.replace("(", r"\(")) as caught:
        find(str(tmp_path / "mine.py"))
    assert "\n" not in str(caught.value)


PICO = Architecture(
    num_layers=6,
    hidden_size=48,
    ffn_hidden_size=96,
    num_attention_heads=6,
    num_query_groups=3,
    head_dim=8,
    vocab_size=509,
)


@pytest.mark.parametrize(
    "layout", [{}, {"tp": 3, "sp": True}, {"pp": 2, "vp": 3}, {"dp": 5}, {"tp": 3, "pp": 2, "dp": 2}]
)
def test_legal_layouts(layout):
    Layout(**layout).check(PICO)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"tp": 2}, "3 query groups.*the nearest legal tp is 1"),
        ({"tp": 4}, "nearest legal tp is 3"),
        ({"tp": 0}, "tp is 0"),
        ({"pp": 4}, "6 layers do not divide into 4 pipeline stages.*the nearest legal number of stages is 3"),
        ({"vp": 2}, "vp=2 needs pp"),
        ({"tp": 3, "sp": True}, "sequences of 32 tokens do not divide by tp=3.*nearest legal length is 33"),
        ({"ep": 2}, "mixture of experts"),
    ],
)
def test_layouts_refused_with_the_nearest(layout, words):
    def check():
        Layout(**layout).check(PICO)
        Layout(**layout).check_sequence(32)

    with pytest.raises(InputError, match=words):
        check()


@pytest.mark.parametrize(
    ("layout", "training", "words"),
    [
        ({"tp": 2, "dp": 2, "ep": 2, "etp": 1}, False, "ep=2 at tp=2 needs sequence parallelism; set sp, or"),
        ({"tp": 2}, True, "training a mixture of experts at tp=2 needs sequence parallelism; set sp, or"),
        ({"ep": 3, "dp": 3}, False, "4 experts do not divide over ep=3; the nearest legal ep is 2"),
        ({"etp": 2}, False, "etp=2 does not divide tp*cp*dp=1 ranks; the nearest legal etp is 1"),
        ({"tp": 2, "etp": 3, "dp": 2}, False, "etp=3 does not divide tp*cp*dp=4 ranks; the nearest legal etp is 2"),
    ],
)
def test_layouts_of_mixtures_refused_with_the_nearest(layout, training, words):
    mixture = PICO.replace(num_attention_heads=8, num_query_groups=4, num_moe_experts=4)
    with pytest.raises(InputError, match=re.escape(words)):
        Layout(**layout).check(mixture, training)


def test_layouts_of_mixtures_that_run():
    mixture = PICO.replace(num_attention_heads=8, num_query_groups=4, num_moe_experts=4)
    Layout(tp=2, dp=2, ep=2, etp=1, sp=True).check(mixture, training=True)
    Layout(tp=2).check(mixture)  # without a backward pass
    Layout(ep=2, dp=2).check(mixture, training=True)


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ({"ffn": 97}, "ffn=97 is not legal; legal are 1 to 96, the nearest is 96"),
        ({"ffn": 0}, "the nearest is 1"),
        ({"ffm": 3}, "did you mean 'ffn'"),
        ({"heads": 5}, "heads=5 is not legal with 3 query groups.*the nearest is 6"),
        ({"vocab": 100}, "a job keeps the vocabulary"),
        ({}, "cuts nothing"),
    ],
)
def test_targets_refused(keep, words):
    with pytest.raises(InputError, match=words):
        target_of(PICO, keep)


def printed(text):
    """The recipe at the end of a dry run."""
    return yaml.safe_load(text[text.index("\nname: ") :])


def test_the_whole_recipe_as_json(job, tmp_path):
    values = {"name": job.name, "teacher": job.teacher, "data": dataclasses.asdict(job.data), "keep": job.keep}
    (tmp_path / "r.json").write_text(json.dumps(values))
    command = ["compress", str(tmp_path / "r.json"), "layout.dp=2", "--json"]
    done = CliRunner().invoke(app, [*command, "--dry-run"])
    derived = job.override(["layout.dp=2", "distillation.global_batch_size=2"])
    assert Job.from_dict(json.loads(done.output)) == fit_to_models(with_resolved_precisions(derived))[0]
    assert isinstance(CliRunner().invoke(app, command).exception, InputError)


def test_dry_run_tells_sizes_and_touches_nothing(job, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    text = describe(job)
    source = from_hf(job.teacher)
    assert f"{source.parameters():,}" in text
    assert f"{source.replace(ffn_hidden_size=64).parameters():,}" in text
    assert Job.from_dict(printed(text)) == fit_to_models(job)[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_student_that_tp_does_not_divide_is_trained_in_the_nearest_layout():
    student = PICO.replace(ffn_hidden_size=64)
    layout, why = Layout(tp=3, sp=True, dp=2).for_student(student, PICO)
    assert layout == Layout(tp=1, dp=2)
    assert "an ffn of 64, so it is distilled at tp=1" in why
    assert Layout(tp=3).for_student(PICO, PICO) == (Layout(tp=3), "")
    wide = PICO.replace(num_attention_heads=32, num_query_groups=8)
    narrow = PICO.replace(num_attention_heads=24, num_query_groups=6)
    assert Layout(tp=8).for_student(narrow, wide)[0].tp == 2  # 6 would divide the student alone


def test_dry_run_refuses_what_could_not_run(job):
    with pytest.raises(InputError, match="nearest legal tp"):
        describe(dataclasses.replace(job, layout=Layout(tp=2)))
    with pytest.raises(InputError, match="does not exist"):
        describe(dataclasses.replace(job, teacher="/nowhere/model"))
    with pytest.raises(InputError, match="does not divide into micro-batches"):
        describe(job.override(["layout.dp=2", "distillation.global_batch_size=1"]))


def test_dry_run_says_which_sizes_it_derived(job):
    """The job that is printed has them, so that the printed recipe is the one that runs."""
    text = describe(job.override(["layout.dp=2"]))
    remark = "remark: distillation.global_batch_size is 2, since a step takes 2 rows at a time, over all ranks"
    assert remark in text.splitlines()
    assert printed(text)["distillation"]["global_batch_size"] == 2
    lengths = [f"{name}.sequence_length=256" for name in ("calibration", "distillation", "evaluation")]
    assert "remark" not in describe(job.override(lengths))
    lengths = ("calibration.sequence_length is 256, since the model has no more positions", "evaluation.sequence")
    assert all(words in describe(job) for words in lengths)
    with pytest.raises(InputError, match=r"distillation.sequence_length is 257, but the model has 256 positions"):
        describe(job.override(["distillation.sequence_length=257"]))
