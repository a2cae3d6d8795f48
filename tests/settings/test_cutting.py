"""What a job puts in place of a plan's slices: refused before anything runs where it has no room."""

import numpy as np
import pytest
from pico import pico_llama, pico_mixtral

from nemo_minitron.artifacts import Compensation, PrunePlan, Scores
from nemo_minitron.artifacts.run_folder import CutFolder
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf, read_config
from nemo_minitron.job import Data, Job
from nemo_minitron.job.dry_run import check, space, stage_names
from nemo_minitron.job.run import open_run
from nemo_minitron.job.stages.compensate import compensation_of_run, cut_identity, unscaled
from nemo_minitron.job.stages.compress import stages
from nemo_minitron.pruning import HFSource
from nemo_minitron.pruning.compensation import solvable
from nemo_minitron.pruning.gaps import gap_scales
from nemo_minitron.search import random_plan


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(pico_llama(tmp_path_factory.mktemp("teacher") / "t"))


def job(teacher, keep, *settings):
    return Job("pico", teacher, Data("a", "b"), keep=keep).override(settings)


@pytest.mark.parametrize(
    ("keep", "settings", "message"),
    [
        ({"heads": 3}, ["cutting.head_residual=paper"], "set cutting.compensate=false"),
        ({"ffn": 48}, ["cutting.ridge=0"], "ridge is 0.0; it must be above 0"),
        ({"ffn": 48}, ["cutting.memory=0"], "memory is 0.0; it must be above 0"),
        ({"ffn": 48}, ["cutting.fill_gaps=true"], "fill_gaps serves a cut of layers, and the job drops none"),
        ({"layers": 4}, ["cutting.reconstruct=2"], "sub-blocks that lost units, and here none does; leave it out"),
        ({"heads": 3}, ["cutting.rotate=true"], "rotate serves a cut of hidden channels, and the job cuts none"),
        (
            {"ffn": 48},
            ["cutting.reconstruct=2", "cutting.reconstruct_batch=3", "layout.dp=2"],
            "reconstruct_batch=3 rows do not divide among 2 data-parallel ranks; the nearest legal is 4",
        ),
        (
            {"ffn": 48},
            ["cutting.compensate=false", "cutting.head_residual=paper"],
            "a head residual needs a cut of some heads",
        ),
        (
            {},
            ["search.params=120K", "cutting.compensate=false", "cutting.head_residual=laco"],
            "head_residual needs sizes in keep",
        ),
    ],
)
def test_refusals(teacher, keep, settings, message):
    with pytest.raises(InputError, match=message):
        check(job(teacher, keep, *settings))


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return str(pico_mixtral(tmp_path_factory.mktemp("experts") / "t"))


@pytest.mark.parametrize(
    ("keep", "settings", "message"),
    [
        ({"experts": 3, "expert_ffn": 24}, [], "re-fits after a cut of expert_ffn; set cutting.compensate=false"),
        ({}, ["search.params=180K"], "keep expert_ffn whole without a search"),
        ({"expert_ffn": 24}, ["cutting.compensate=false"], "drops no experts, so there is nothing to merge"),
        ({"experts": 3}, ["calibration.method=magnitude"], "leave calibration.method=activation"),
        ({"experts": 3}, ['calibration.axes=["expert_ffn"]'], "'experts' among calibration.axes"),
    ],
)
def test_refusals_of_merging(experts, keep, settings, message):
    with pytest.raises(InputError, match=message):
        check(job(experts, keep, "cutting.merge_experts=true", *settings))


def test_experts_are_merged_or_fitted(experts):
    with pytest.raises(InputError, match="merge_experts averages experts, and reconstruct fits them"):
        check(job(experts, {"experts": 3, "heads": 3}, "cutting.merge_experts=true", "cutting.reconstruct=1"))


def test_a_dense_model_has_nothing_to_merge(teacher):
    with pytest.raises(InputError, match="the model has no experts to merge"):
        check(job(teacher, {"ffn": 48}, "cutting.merge_experts=true"))


@pytest.mark.parametrize("keep", [{"experts": 3}, {"experts": 3, "heads": 3}])
def test_merging_beside_the_re_fit_of_heads(experts, keep):
    check(job(experts, keep, "cutting.merge_experts=true"))


@pytest.mark.parametrize("on", [True, False])
def test_a_job_merges_the_experts_that_it_drops(experts, tmp_path, on):
    """By the scores of the run; another student than that of the slices, which a run without the setting resumes."""
    source = HFSource(experts)
    a = source.architecture
    plan = random_plan(a, keep={"experts": 3})
    asked = job(experts, {"experts": 3}, *(["cutting.merge_experts=true"] if on else []))
    run = open_run(asked, tmp_path / "run")
    states = {f"experts/routed,mean/{field}": np.ones((6, 2, 4)) for field in ("count", "sum")}
    plan.save(run.folder.plan)
    Scores(a, {"experts": np.ones((6, 4), np.float32)}, states=states).save(run.folder.scores)
    made = compensation_of_run(run, source, run.folder)
    assert (made is not None and len(made.tensors) == 6 * 3) if on else made is None
    assert (cut_identity(asked, run.folder)[4:] == ["merged experts"]) is on
    assert ("merge_experts" in asked.cutting.deciding()) is on


@pytest.mark.parametrize("keep", [{"ffn": 48}, {"heads": 3}, {"query_groups": 1}, {"ffn": 48, "layers": 4}])
def test_on_by_default_where_something_is_left_to_solve(teacher, keep):
    names = stage_names(job(teacher, keep), checkpoint=False)
    assert names[names.index("plan") :][:4] == ["plan", "gates", "compensate", "prune"]
    assert "compensate" not in stage_names(job(teacher, keep, "cutting.compensate=false"), checkpoint=False)


def test_neurons_of_experts_leave_matrices_too(tmp_path):
    mixture = str(pico_mixtral(tmp_path / "m"))
    assert "compensate" in stage_names(job(mixture, {"expert_ffn": 24}), checkpoint=False)
    assert "compensate" not in stage_names(job(mixture, {"experts": 3}), checkpoint=False)


@pytest.mark.parametrize("keep", [{"layers": 4}, {"hidden": 40}])
def test_depth_and_hidden_leave_nothing_to_solve(teacher, keep):
    assert "compensate" not in stage_names(job(teacher, keep), checkpoint=False)


def test_disk_for_what_is_solved(teacher):
    """Two fp32 copies of `down` and `o`: the file, and the parts that it is made of."""
    source = from_hf(teacher)
    both = (
        space(job(teacher, {"ffn": 48}, f"cutting.compensate={on}"), read_config(teacher)) for on in ("true", "false")
    )
    heads = source.num_attention_heads * source.head_dim
    assert next(both) - next(both) == 2 * 4 * source.num_layers * source.hidden_size * (48 + heads)


def test_a_cut_models_identity(teacher, tmp_path):
    """What was solved for a plan is part of it; a file that is gone is said to be."""
    plan, solving = random_plan(from_hf(teacher), keep={"ffn": 48}), job(teacher, {"ffn": 48})
    plan.save(tmp_path / "plan.json")
    with pytest.raises(InputError, match="does not exist"):
        cut_identity(solving, CutFolder(tmp_path))
    found = []
    for value in (0, 0, 1):
        tensors = {name: np.full(plan.target.shapes()[name], value, np.float32) for name, _ in solvable(plan)}
        Compensation(plan.digest, tensors).save(tmp_path / "compensation.safetensors")
        found.append(cut_identity(solving, CutFolder(tmp_path)))
    assert found[0] == found[1] != found[2]
    assert cut_identity(job(teacher, {"ffn": 48}, "cutting.compensate=false"), CutFolder(tmp_path))[2] is None


@pytest.mark.parametrize("settings", [(), ("search.params=120K",), ("rounds=3",), ("cutting.compensate=false",)])
def test_the_dry_run_names_the_stages_that_run(teacher, settings):
    asked = job(teacher, {} if "search" in str(settings) else {"ffn": 48}, *settings)
    assert stage_names(asked, checkpoint=False) == [stage.name for stage in stages(asked)]


@pytest.mark.parametrize(
    ("keep", "normalization", "setting", "folds"),
    [
        ({"hidden": 40}, "rmsnorm", "true", True),
        ({"hidden": 40}, "rmsnorm", "false", False),
        ({"hidden": 40}, "layernorm", "true", False),
        ({"ffn": 48}, "rmsnorm", "true", False),
    ],
)
def test_norms_are_folded_where_hidden_channels_of_an_rmsnorm_are_cut(teacher, keep, normalization, setting, folds):
    source = from_hf(teacher).replace(normalization=normalization)
    target = random_plan(source, keep=keep).target
    assert job(teacher, keep, f"cutting.fold_norms={setting}").cutting.folds(source, target) is folds
    assert job(teacher, keep).cutting.folds(source, target) is (folds or setting == "false")


@pytest.mark.parametrize(
    ("keep", "settings", "scaled"),
    [
        ({"layers": 4}, (), True),
        ({"layers": 4}, ("cutting.scale_gaps=false",), False),
        ({"ffn": 48}, (), False),
        ({"layers": 4}, ("calibration.method=taylor",), False),  # only activations have the stream
        ({"layers": 4}, ("calibration.axes=layers",), False),
    ],
)
def test_what_is_written_behind_dropped_layers_is_scaled_where_the_stream_is_scored(teacher, keep, settings, scaled):
    source, asked = from_hf(teacher), job(teacher, keep, *settings)
    plan = random_plan(source, keep=keep)
    assert asked.cutting.scales(source, plan.target, asked.calibration.scores_stream) is scaled
    said = unscaled(asked, plan)
    assert said.startswith("nothing is scaled behind dropped layers") if "calibration" in str(settings) else not said
    assert not (said and scaled)


def test_a_filled_gap_is_scaled_by_its_own_pass(teacher):
    """Not by the scores, so a calibration without the stream does as well. The stage is there without neurons, too."""
    keep, fills = {"layers": 4}, "cutting.fill_gaps=true"
    plan, asked = random_plan(from_hf(teacher), keep=keep), job(teacher, keep, fills, "calibration.method=taylor")
    assert not asked.cutting.scales(plan.source, plan.target, True)
    assert unscaled(asked, plan) == ""
    assert "compensate" in stage_names(asked, checkpoint=False)
    assert "compensate" not in stage_names(job(teacher, keep), checkpoint=False)
    assert asked.cutting.fitting() != job(teacher, keep).cutting.fitting()
    assert asked.cutting.deciding() != job(teacher, keep).cutting.deciding()
    assert "fill_gaps" not in job(teacher, keep).cutting.deciding()
    with pytest.raises(InputError, match="fill_gaps is a re-fit; leave cutting"):
        job(teacher, keep, fills, "cutting.compensate=false")


def test_the_stream_may_be_among_the_axes(teacher):
    asked = job(teacher, {"layers": 4}, 'calibration.axes=["layers","stream"]')
    plan = random_plan(from_hf(teacher), keep={"layers": 4})
    assert asked.cutting.scales(plan.source, plan.target, asked.calibration.scores_stream)
    assert unscaled(asked, plan) == ""


@pytest.mark.parametrize(("setting", "scaled"), [("true", True), ("false", False)])
def test_a_job_scales_behind_dropped_layers(teacher, tmp_path, setting, scaled):
    """By the scores of the run, for its plan; asked not to, the student has nothing but slices."""
    source = HFSource(teacher)
    a = source.architecture
    plan = PrunePlan(a, a.keep_layers([0, 2, 3, 5]), {"layers": [0, 2, 3, 5]})
    run = open_run(job(teacher, {"layers": 4}, f"cutting.scale_gaps={setting}"), tmp_path / "run")
    scores = Scores(a, {"stream": np.arange(7, dtype=np.float32) ** 2 / 9})
    plan.save(run.folder.plan)
    scores.save(run.folder.scores)
    made = compensation_of_run(run, source, run.folder)
    scales = gap_scales(plan, scores)
    assert len(scales) == 2 * 3
    assert (made is not None and made.scales == scales) if scaled else made is None
    assert cut_identity(run.job, run.folder)[3] is scaled
