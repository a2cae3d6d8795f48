"""A recipe's budget: what it asks for, what is refused, what the dry run and the calibration make of it."""

import json

import pytest
from pico import SIZES
from spaces import PICO

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.cli.find import find
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf, multiples_of, read_config
from nemo_minitron.job import Data, Job, Search
from nemo_minitron.job.calibrations import calibration_of
from nemo_minitron.job.dry_run import check, describe
from nemo_minitron.job.stages.search import sizes_of
from nemo_minitron.search import random_plan


@pytest.fixture
def job(tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **SIZES}))
    return Job("pico", str(teacher), Data("train.jsonl", "test.jsonl"), search=Search(params="150K"))


def test_the_shipped_recipe():
    job = find("smollm2_135m_to_84m_search")
    assert job.search.wanted
    assert Job.from_dict(json.loads(json.dumps(job.as_dict()))) == job
    assert (job.search.candidates, job.search.distil) == (12, 4)


def test_targets():
    search = Search(
        params="8.27B", params_no_embeddings="6B", active_params="5B", memory="8GiB", flops="20G", batch=3, context=70,
        weights="fp8", kv_cache="fp8", tolerance="10%",
    )  # fmt: skip
    costs = [target.cost(PICO) for target in search.targets()]
    assert costs == [
        PICO.parameters(),
        PICO.parameters(embeddings=False),
        PICO.parameters(active=True),
        PICO.memory(batch=3, context=70, weights="fp8", kv_cache="fp8"),
        PICO.flops_per_token(70),
    ]
    assert [target.ends for target in search.targets()[2:]] == [
        (4_500_000_000, 5_500_000_000), (0, 8 * 2**30), (0, 20 * 10**9),
    ]  # fmt: skip
    assert Search().targets() == []
    assert not Search().wanted


def test_the_dry_run_tells_the_search(job):
    source, target = check(job)
    found = job.search.run(source, {}, loads=multiples_of(read_config(job.teacher)))
    assert target == found.candidates[0].architecture
    assert 142_500 <= target.parameters() <= 150_000
    text = describe(job)
    assert f"{found.combinations:,} shapes, {found.fitting:,} with at most 150,000 parameters;" in text
    assert f"{len(found.candidates)} are cut and measured" in text
    assert "estimate, candidates, gates, compensate, measure, rank, plan, prune" in text


def test_a_job_that_would_cut_nothing_is_refused(job):
    source = from_hf(job.teacher)
    with pytest.raises(InputError, match=f"nothing has to be cut: the model, with {source.parameters():,} parameters"):
        check(job.override(["search.params=1M"]))


def test_kept_axes_stay(job):
    changed = job.override(["keep.hidden=48", "search.bounds=layers=5:6"])
    source, _ = check(changed)
    assert {c.architecture.hidden_size for c in changed.search.run(source, changed.keep).candidates} == {48}


def test_a_criterion_of_depth_is_gathered_for_every_depth(job):
    source = from_hf(job.teacher)
    assert calibration_of(job, source).depth == ()
    scanned = calibration_of(job.override(["depth=loss"]), source)  # three to six of six layers stay
    assert (scanned.depth, scanned.depth_sizes) == (("loss",), (1, 2, 3))
    with pytest.raises(InputError, match="the recipe drops none"):
        calibration_of(job.override(["depth=loss", "keep.layers=6"]), source)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["search.params=20K"], "shapes has at most 20,000 parameters; the nearest is layers=3"),
        (["search.params=lots"], "--params=lots is not a size"),
        (["search.param=3"], "no key 'search.param'; did you mean 'search.params'"),
        (["search.latency=3ms", "search.params="], "search.latency needs another target"),
        (["search.distil=13"], "search.candidates is 12; the nearest legal search.distil is 12"),
        (["search.steps=61"], "search.steps 61 do not divide into 3 rounds; the nearest legal number is 60"),
        (["search.candidates=0"], "candidates is 0; the nearest legal value is 1"),
        (["search.weights=fp16"], "weights 'fp16' is unknown; did you mean"),
        (["search.bounds=ffn=10"], "has no two ends"),
        (["keep.vocab=500"], "a job keeps the vocabulary"),
        (["search.params="], "the recipe cuts nothing"),
    ],
)
def test_refused(job, settings, words):
    with pytest.raises(InputError, match=words):
        check(job.override(settings))


def test_sizes_of_a_plan_make_a_baseline_of_its_shape():
    keep = {"layers": 3, "hidden": 7, "heads": 4}
    made = random_plan(PICO, keep)
    assert sizes_of(made) == keep
    groups = random_plan(PICO, {"query_groups": 2, "ffn": 9})
    assert isinstance(groups, PrunePlan)
    assert sizes_of(groups) == {"query_groups": 2, "ffn": 9}  # their heads come along
