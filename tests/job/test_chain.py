"""Chains of students: the recipe's steps, the jobs that they become, and what is refused before anything runs."""

import dataclasses
import json

import pytest
from corpora import write_indexed
from pico import SIZES, pico_llama

from nemo_minitron.artifacts import PrunePlan, compose
from nemo_minitron.artifacts.run_folder import CutFolder
from nemo_minitron.cli.find import find
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.job import Data, Distillation, Job, Step
from nemo_minitron.job.chain import describe_chain, jobs_of, summary, table
from nemo_minitron.job.compress import run_compress
from nemo_minitron.job.lineage import check_lineage, plan_of_learned
from nemo_minitron.job.run import open_run
from nemo_minitron.job.stages import distill as stage
from nemo_minitron.search import random_plan


@pytest.fixture
def chain():
    steps = (Step("80", keep={"ffn": 80}), Step("64", keep={"ffn": 64}, rounds=2, distillation={"tokens": 500}))
    return Job(name="pico", teacher="teacher", data=Data("train.jsonl", "test.jsonl"), chain=steps)


def test_a_chain_survives_json_and_overrides_reach_its_steps(chain):
    assert Job.from_dict(json.loads(json.dumps(chain.as_dict()))) == chain
    settings = ["chain.0.keep.layers=5", "chain.1.distillation.learning_rate=0.1", "chain.1.search.params=1M"]
    changed = chain.override([*settings, "chain.1.teacher=previous"])
    assert changed.chain[0].keep == {"ffn": 80, "layers": 5}
    assert changed.chain[1].distillation == {"tokens": 500, "learning_rate": 0.1}
    assert (changed.chain[1].search.params, changed.chain[1].teacher) == ("1M", "previous")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("chain.2.keep.ffn=3", "no key 'chain.2.keep.ffn'; did you mean 'chain.1.keep.ffn'"),
        ("chain.0.kep.ffn=3", "did you mean 'chain.0.keep.ffn'"),
        ("chain.0.round=3", "did you mean 'chain.0.rounds'"),
        ("chain.0=3", "no key 'chain.0'"),
        ("chain=3", "'chain.0' is 3; it must be a group of settings: name, keep"),
        ("chain.0.rounds=0", "rounds is 0; the nearest legal value is 1"),
        ("chain.0.rounds=x", "'chain.0.rounds' is 'x'; it must be a whole number"),
        ("chain.0.calibration=3", "is a group of settings; set one of chain.0.calibration.NAME"),
        ("chain.0.teacher=frist", "teacher 'frist' is unknown; did you mean 'first'"),
        ("chain.0.name=a/b", "step 'a/b' cannot name a folder"),
        ("chain.0.name=chain.json", "step 'chain.json' cannot name a folder"),
        ("chain.0.name=64", "'chain.0.name' is 64; it must be a text"),
        ('chain.0.name="64"', "two steps of the chain are named '64'"),
        ("keep.ffn=3", "take 'keep' out of the job"),
        ("rounds=2", "take 'rounds' out of the job"),
        ("learns_from=other", "take 'learns_from' out of the job"),
    ],
)
def test_bad_steps_are_refused(chain, setting, words):
    with pytest.raises(InputError, match=words):
        chain.override([setting])


def test_no_job_has_less_than_a_round(chain):
    with pytest.raises(InputError, match="rounds is 0; the nearest legal value is 1"):
        Job(name="pico", teacher="teacher", data=chain.data, keep={"ffn": 64}, rounds=0)


@pytest.fixture
def pico(chain, tmp_path):
    """The chain with a teacher that has a config."""
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **SIZES}))
    lengths = ["calibration.sequence_length=16", "distillation.sequence_length=16"]
    return dataclasses.replace(chain, teacher=str(teacher)).override(lengths)


def test_each_step_is_a_job_of_the_student_before_it(pico, tmp_path):
    run = tmp_path / "run"
    third = Step("48", keep={"ffn": 48}, calibration={"samples": 7})
    last = Step("32", keep={"ffn": 32}, teacher="previous", distillation={"precision": "auto"})
    one, two, three, four = jobs_of(dataclasses.replace(pico, chain=(*pico.chain, third, last)), run)
    assert [job.teacher for job in (one, two)] == [pico.teacher, str(run / "80" / "student")]
    assert [job.learns_from for job in (one, two, three, four)] == ["", pico.teacher, pico.teacher, ""]
    assert (one.lineage, three.lineage) == ((), (str(run / "80" / "plan.json"), str(run / "64" / "plan.json")))
    assert (one.keep, two.keep, two.rounds) == ({"ffn": 80}, {"ffn": 64}, 2)
    assert (two.distillation.tokens, one.distillation.tokens) == (500, pico.distillation.tokens)
    assert (three.calibration.samples, two.calibration.samples) == (7, pico.calibration.samples)
    assert four.distillation.precision in ("fp32", "bf16")
    assert (one.name, four.base_model, three.base_model) == ("pico-80", "pico-48", None)
    assert not any(job.chain for job in (one, two, three, four))


def test_the_dry_run_tells_every_step_and_touches_nothing(pico, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    text = describe_chain(pico, tmp_path / "run")
    source = from_hf(pico.teacher)
    sizes = [f"{source.replace(ffn_hidden_size=ffn).parameters():>16,}" for ffn in (96, 80, 64)]
    assert all(f"{name:20}{size}" in text for name, size in zip(("teacher", "80", "64"), sizes, strict=True))
    assert f"ffn_hidden_size         {80:>16}{64:>16}" in text
    assert f"step 2 of 2: 64, in {tmp_path / 'run' / '64'}" in text
    assert f"learned from: {pico.teacher}, {source.parameters():,} parameters" in text
    assert "round 1 of 2: ffn 72" in text
    assert "distillation: 31 steps, 496 tokens" in text
    assert sorted(tmp_path.rglob("*")) == before


def test_the_dry_run_says_which_sizes_the_chain_and_its_steps_derived(pico, tmp_path):
    changed = pico.override(
        ["layout.dp=2", "chain.1.distillation.learning_rate=1e-6", "evaluation.sequence_length=256"]
    )
    before, first, second = describe_chain(changed, tmp_path / "run").split("\nstep ")
    whole = "remark: distillation.global_batch_size is 2, since a step takes 2 rows at a time, over all ranks"
    assert whole in before.splitlines()
    assert "remark" not in first
    assert "remark: distillation.min_learning_rate is 1e-07, since a tenth of learning_rate" in second.splitlines()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("chain.1.keep.ffn=81", "step '64': ffn=81 is not legal; legal are 1 to 80, the nearest is 80"),
        ("chain.1.keep.ffm=3", "step '64': .*did you mean 'ffn'"),
        ("chain.0.keep.vocab=100", "step '80': a job keeps the vocabulary"),
        ("chain.1.keep={}", "step '64': the recipe cuts nothing"),
        ("chain.1.distillation.token=3", "step '64': .*'distillation.token'; did you mean 'tokens'"),
        ("chain.1.calibration.samples=0", "step '64': samples is 0; the nearest legal value is 1"),
        ("chain.1.rounds=17", "step '64': rounds=17 leaves some round nothing to cut; the nearest legal number is 16"),
        ("chain.1.distillation.intermediate=block:0:6", "step '64': 'block:0:6' names layer 6 of the teacher"),
        ("layout.tp=2", "step '80': .*nearest legal tp"),
    ],
)
def test_steps_that_could_not_run_are_refused_before_any_runs(pico, setting, words, tmp_path):
    if setting.endswith("={}"):
        bad = dataclasses.replace(pico, chain=(pico.chain[0], dataclasses.replace(pico.chain[1], keep={}, rounds=1)))
    else:
        bad = pico.override([setting])
    for what in (lambda: describe_chain(bad, tmp_path / "run"), lambda: run_compress(bad, tmp_path / "run")):
        with pytest.raises(InputError, match=words):
            what()
    assert not (tmp_path / "run").exists()


def test_a_chain_stops_at_no_single_stage(pico, tmp_path):
    with pytest.raises(InputError, match="each step of a chain has a stage 'plan'"):
        run_compress(pico, tmp_path / "run", until="plan")


def test_the_summary_has_the_teacher_once_and_every_student(chain, tmp_path):
    numbers = {"corpus": "text", "loss": 1.0, "tokens": 9, "bits_per_byte": None, "seconds": 1.0}
    for name, sizes in (("80", (30, 20)), ("64", (20, 10))):
        stages = (("teacher", sizes[0], 5.0), ("pruned", sizes[1], 9.5), ("distilled", sizes[1], 6.25))
        (tmp_path / name).mkdir()
        rows = [{"stage": stage, "parameters": p, "perplexity": ppl, **numbers} for stage, p, ppl in stages]
        (tmp_path / name / "numbers.json").write_text(json.dumps(rows))
    rows = summary(chain, tmp_path)
    assert [(row["name"], row["parameters"], row["perplexity"], row.get("pruned")) for row in rows] == [
        ("teacher", 30, 5.0, None),
        ("80", 20, 6.25, 9.5),
        ("64", 10, 6.25, 9.5),
    ]
    assert table(rows).splitlines()[-1].split() == ["64", "10", "9.50", "6.25"]


# -- what a student learns from another model than the one that it is cut from ---------------------------
SOURCE = from_hf({"architectures": ["LlamaForCausalLM"], **SIZES})


@pytest.fixture
def plans(tmp_path):
    """Files of a cut of layers, and of one of its student."""
    first = random_plan(SOURCE, {"layers": 5})
    second = random_plan(first.target, {"layers": 3, "ffn": 64})
    for name, plan in (("first", first), ("second", second)):
        plan.save(tmp_path / name / "plan.json")
    return tmp_path / "first" / "plan.json", tmp_path / "second" / "plan.json"


def test_a_students_layers_are_counted_in_what_it_learns_from(chain, plans):
    first, second = plans
    job = Job("pico", "student", chain.data, {"ffn": 64}, learns_from="teacher", lineage=(str(first),))
    cut = CutFolder(second.parent)
    made = plan_of_learned(job, cut)
    assert made == second.with_name("lineage.json")
    assert PrunePlan.load(made) == compose(PrunePlan.load(first), PrunePlan.load(second))
    assert plan_of_learned(dataclasses.replace(job, lineage=()), cut) is None
    assert plan_of_learned(dataclasses.replace(job, learns_from="", lineage=()), cut) == second


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learns_from": "", "lineage": ("a.json",)}, "set both or neither"),
        ({"lineage": (), "distillation": Distillation(intermediate="auto")}, "intermediate=auto needs to know"),
        ({"lineage": ("second/plan.json",)}, "'teacher' has .* parameters, but the plans say"),
        ({"lineage": ("first/plan.json", "first/plan.json")}, "the plans do not follow each other"),
    ],
)
def test_lineages_refused(chain, plans, changes, words, monkeypatch):
    monkeypatch.chdir(plans[0].parent.parent)
    job = Job("pico", "student", chain.data, {"layers": 3}, learns_from="teacher", lineage=("first/plan.json",))
    cut, student = (SOURCE.replace(num_layers=layers) for layers in (5, 3))
    check_lineage(job, student, cut, SOURCE)
    with pytest.raises(InputError, match=words):
        check_lineage(dataclasses.replace(job, **changes), student, cut, SOURCE)
    with pytest.raises(InputError, match="'teacher' has 500 tokens in its vocabulary and the student has 509"):
        check_lineage(job, student, cut, SOURCE.replace(vocab_size=500))


def test_the_distillation_is_taught_by_what_it_learns_from(chain, plans, tmp_path, monkeypatch):
    """All that the stage hands on: the first teacher, and the student's plan in that one's layers."""
    asked = {}

    def run_training(student, teacher, texts, out, recipe, layout, log, stop, plan):
        asked.update(teacher=teacher.path, plan=plan, stop=stop)

    monkeypatch.setattr(stage, "run_training", run_training)
    text = write_indexed(tmp_path / "text", [range(5_000)])
    monkeypatch.setattr(stage, "trained_on", lambda run: text)
    for name in ("teacher", "run/checkpoints/pruned"):
        pico_llama(tmp_path / name)
    job = Job(
        "pico", "student", chain.data, {"ffn": 64}, learns_from=str(tmp_path / "teacher"), lineage=(str(plans[0]),)
    )
    (tmp_path / "run" / "recipe.json").touch()
    run = open_run(job, tmp_path / "run")
    PrunePlan.load(plans[1]).save(run.path("plan.json"))
    stage.distill(run)
    assert asked == {"teacher": tmp_path / "teacher", "plan": run.path("lineage.json"), "stop": None}


def test_the_shipped_chain(tmp_path):
    """Its dry run, with a teacher of SmolLM2-135M's sizes."""
    sizes = {
        "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **sizes}))
    recipe = find("smollm2_135m_to_108m_to_81m_chain").override([f"teacher={tmp_path}"])
    rows = [line.split() for line in describe_chain(recipe, tmp_path / "run").splitlines()[1:4]]
    assert rows == [["teacher", "134,515,008"], ["108m", "107,972,928", "30,208"], ["81m", "80,979,696", "60,416"]]
