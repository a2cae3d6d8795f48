"""A calibration's settings: refusals, what a plan adds to them, and what makes an unfinished one begin anew."""

import dataclasses
import json

import pytest
from test_recipe import PICO, job  # noqa: F401

from nemo_minitron.errors import InputError
from nemo_minitron.job import Calibration, Job, Layout
from nemo_minitron.job.calibrations import calibration_of
from nemo_minitron.job.dry_run import describe
from nemo_minitron.settings.calibration import DECIDE, DERIVED, STATISTICS, axes_of

ITEM = {"context": "a", "choices": ["b", "c"], "answer": 1}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"criterion": "l2,mean;l2"}, "criterion 'l2' must be two aggregations"),
        ({"depth": ("los",)}, "depth criterion 'los' is unknown; did you mean 'loss'"),
        ({"depth_sizes": (1, 0)}, "blocks of 0 layers; the nearest legal size is 1"),
        ({"depth_samples": 0}, "depth_samples is 0; the nearest legal value is 1"),
        ({"remove": -1}, "remove is -1; the nearest legal value is 0"),
    ],
)
def test_settings_refused(settings, words):
    with pytest.raises(InputError, match=words):
        Calibration(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"depth": ("loss",), "depth_sizes": (2, 6)}, "depth_sizes 6 is not legal in a model of 6 layers"),
        ({"depth": ("removal",), "remove": 6}, "remove 6 is not legal.*the nearest is 5"),
        ({"depth": ("removal",)}, "depth 'removal' needs 'remove'; set both or neither"),
        ({"remove": 2}, "remove needs depth criterion 'removal'"),
        ({"depth": ("accuracy",)}, "depth 'accuracy' needs 'items'"),
        ({"items": "nowhere.jsonl", "depth": ("accuracy",)}, "the questions 'nowhere.jsonl' cannot be read"),
    ],
)
def test_refused_for_a_model(settings, words):
    with pytest.raises(InputError, match=words):
        Calibration(**settings).check(PICO, Layout())


def test_a_plan_adds_the_blocks_that_it_takes():
    mine = Calibration(depth=("perplexity",), depth_sizes=(1,))
    assert mine.for_plan("block_influence", 2) is mine
    assert mine.for_plan("loss", 2) == dataclasses.replace(mine, depth=("perplexity", "loss"), depth_sizes=(1, 2))
    assert Calibration().for_plan("removal", 2) == Calibration(depth=("removal",), remove=2)
    with pytest.raises(InputError, match="depth 'removl' is unknown; did you mean 'removal'"):
        mine.for_plan("removl", 2)
    with pytest.raises(InputError, match="the recipe drops none"):
        mine.for_plan("loss", 0)


def test_recipes_take_lists_and_single_values(job):  # noqa: F811
    changed = job.override(["calibration.depth=loss", "calibration.depth_sizes=[1,2]", "keep.layers=4", "depth=loss"])
    assert (changed.calibration.depth, changed.calibration.depth_sizes) == (("loss",), (1, 2))
    assert Job.from_dict(json.loads(json.dumps(changed.as_dict()))) == changed
    with pytest.raises(InputError, match=r"'calibration\.depth_sizes' is 'two'; it must be a whole number"):
        job.override(["calibration.depth_sizes=two"])
    assert calibration_of(changed, PICO).depth_sizes == (1, 2)
    text = describe(changed)
    assert "criterion of dropped layers: loss" in text
    assert "loss without blocks of 1, 2 layers, on 16 rows" in text
    with pytest.raises(InputError, match="depth 'accuracy' needs 'items'"):
        describe(changed.override(["depth=accuracy"]))


def test_what_makes_it_begin_anew(tmp_path):
    """Each setting decides what it must, and no more: other blocks leave the statistics as they are."""
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps(ITEM))
    mine = Calibration(depth=("loss", "accuracy"), items=str(items))
    marks = mine.marks("model", "data")
    assert marks == mine.marks("model", "data")
    assert set(marks) == {STATISTICS, "loss", "accuracy"}
    assert not set(marks.values()) & set(mine.marks("model", "other").values())
    other = dataclasses.replace(mine, depth_sizes=(2,)).marks("model", "data")
    assert [name for name in marks if marks[name] == other[name]] == [STATISTICS]
    more = dataclasses.replace(mine, samples=2048, axes=("ffn",)).marks("model", "data")
    assert [name for name in marks if marks[name] == more[name]] == ["loss", "accuracy"]
    items.write_text(json.dumps(ITEM | {"answer": 0}))
    assert [name for name in marks if marks[name] == mine.marks("model", "data")[name]] == [STATISTICS, "loss"]


def test_every_setting_decides_something():
    fields = {field.name for field in dataclasses.fields(Calibration)}
    # `experts` chooses among what every calibration gathers
    assert fields - {"depth", "items", "experts"} == {setting for settings in DECIDE.values() for setting in settings}


def test_axes_are_those_of_the_built_in_estimators():
    """But for the latents of multi-latent attention, which none of the families has."""
    from nemo_minitron.importance.estimators import dense, latent, mamba, moe
    from nemo_minitron.importance.registry import Estimator

    classes = [value for module in (dense, mamba, moe) for value in vars(module).values() if isinstance(value, type)]
    registered = {cls.axis for cls in classes if issubclass(cls, Estimator) and hasattr(cls, "axis")}
    everything = PICO.replace(
        qk_norm=True, num_moe_experts=4, moe_layer_freq=(0, 1, 1, 1, 1, 1), moe_shared_expert_intermediate_size=8
    )
    sizes = {"mamba_num_heads": 2, "mamba_head_dim": 3, "mamba_num_groups": 1, "mamba_state_dim": 4}
    hybrid = PICO.replace(hybrid_pattern="M*-M*-", **sizes)
    assert {*axes_of(everything), *axes_of(hybrid)} == registered | set(DERIVED)
    assert "mamba_heads" not in axes_of(everything)
    assert not registered & {latent.QueryLatentNorm.axis, latent.KeyValueLatentNorm.axis}
    assert not {"experts", "q_norm", "shared_expert_ffn"} & set(axes_of(PICO))
