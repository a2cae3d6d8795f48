"""Sizes that nobody asked for give way where they do not fit, and it is said; the checks refuse what was asked for."""

import dataclasses
import json

import pytest

from nemo_minitron.artifacts.files import digest_of
from nemo_minitron.errors import InputError
from nemo_minitron.job import Calibration, Data, Distillation, Job, Layout
from nemo_minitron.schema import Unasked, asked_for
from nemo_minitron.settings.derive import Fit, fit_job, fit_job_to_models
from nemo_minitron.settings.recipe import with_defaults_unasked

JOB = Job("pico", "teacher", Data("train", "test"))


class Text:
    """What a fit asks of Tokens."""

    def __init__(self, tokens):
        self.tokens = tokens

    def samples(self, length):
        return self.tokens // length


@pytest.mark.parametrize(
    ("settings", "layout", "size"),
    [
        ({}, Layout(dp=2), 2),
        ({"micro_batch_size": 4}, Layout(dp=2), 8),
        ({"micro_batch_size": 2}, Layout(pp=2, vp=2), 4),
        ({}, Layout(pp=2), 1),
    ],
)
def test_a_global_batch(settings, layout, size):
    fit = Fit(Distillation(**settings), layout)
    assert fit.settings.global_batch_size == size
    assert bool(fit.remark) == (size > 1)
    fit.settings.check_batch(layout)
    asked = Distillation(**settings, global_batch_size=1)
    assert Fit(asked, layout).settings is asked
    if size > 1:
        with pytest.raises(InputError, match=f"nearest legal size is {size}"):
            asked.check_batch(layout)


def test_a_length_by_the_model_and_the_text():
    fit = Fit(Calibration(), Layout(cp=2, tp=3, sp=True))
    assert fit.settings.sequence_length == 4092  # of 4,096 what 2 * cp and tp divide
    fit.model(256)
    assert fit.settings.sequence_length == 252
    fit.text(Text(100_000))
    assert (fit.settings.sequence_length, fit.settings.samples, fit.settings.depth_samples) == (252, 395, 16)
    fit.text(Text(250))
    assert (fit.settings.sequence_length, fit.settings.samples, fit.settings.depth_samples) == (240, 1, 1)
    assert fit.remark.startswith("sequence_length is 240, since the text has no more tokens; samples is 1, since")


def test_a_calibration_needs_a_label_too():
    fit = Fit(Calibration(), Layout())
    fit.text(Text(1022))
    assert (fit.settings.sequence_length, fit.settings.samples) == (1021, 1)


def test_a_length_that_a_model_derived_is_derived_again():
    """Left out by hand: a plain int after the first call, which the second one would refuse or leave too long."""
    first = Fit(Calibration(), Layout())
    first.model(256)
    second = Fit(first.settings, Layout())
    second.model(128)
    second.text(Text(100))
    assert (first.settings.sequence_length, second.settings.sequence_length) == (256, 99)


def test_a_job_fits_its_models():
    job, remark = fit_job_to_models(JOB.override(["calibration.sequence_length=64"]), 256)
    assert (job.calibration.sequence_length, job.distillation.sequence_length) == (64, 256)
    assert job.evaluation.sequence_length == 256
    why = "since the model has no more positions"
    assert remark == f"distillation.sequence_length is 256, {why}; evaluation.sequence_length is 256, {why}"
    for group in ("calibration", "distillation", "evaluation"):
        with pytest.raises(InputError, match=rf"{group}\.sequence_length is 300, but the model has 256 positions"):
            fit_job_to_models(JOB.override([f"{group}.sequence_length=300"]), 256)


def test_fp8_wants_whole_tiles():
    fit = Fit(Calibration(precision="fp8-current"), Layout())
    fit.model(250)
    assert fit.settings.sequence_length == 240


def test_a_training_needs_a_label_behind_its_last_token():
    fit = Fit(Distillation(), Layout())
    fit.text(Text(5000), Text(301))
    assert fit.settings.sequence_length == 300
    fit = Fit(Distillation(), Layout())
    fit.exactly(128, "the cache's rows have this length")
    assert fit.remark == "sequence_length is 128, since the cache's rows have this length"


def test_what_was_asked_for_stays():
    asked = Calibration(samples=1024, sequence_length=4096, depth_samples=16)
    fit = Fit(asked, Layout(tp=3, sp=True))
    fit.model(4096)
    fit.text(Text(100))
    assert fit.settings is asked
    assert fit.remark == ""
    with pytest.raises(InputError, match=r"is 4096, but the model has 64 positions.*nearest legal value is 63"):
        fit.model(64)
    low = Distillation(learning_rate=1e-6, min_learning_rate=1e-5)
    assert Fit(low, Layout()).settings is low


def test_a_rate_that_would_rise():
    assert Fit(Distillation(learning_rate=1e-6), Layout()).settings.min_learning_rate == pytest.approx(1e-7)
    assert Fit(Distillation(learning_rate=1e-3), Layout()).settings.min_learning_rate == 1e-5


def test_defaults_that_fit_leave_a_job_as_it_was():
    job, remark = fit_job(JOB)
    assert (job, remark) == (JOB, "")
    assert digest_of(job.as_dict()) == digest_of(json.loads(json.dumps(JOB.as_dict())))
    assert not asked_for(job.distillation.global_batch_size)


def test_a_job_derives_what_its_layout_wants_and_refuses_what_was_asked():
    job, remark = fit_job(JOB.override(["layout.dp=2"]))
    assert job.distillation.global_batch_size == 2
    assert remark == "distillation.global_batch_size is 2, since a step takes 2 rows at a time, over all ranks"
    assert asked_for(job.distillation.global_batch_size)
    asked = JOB.override(["layout.dp=2", "distillation.global_batch_size=1"])
    assert fit_job(asked) == (asked, "")


def test_a_default_stays_one_through_every_way_that_a_job_takes():
    job = Job.from_dict(JOB.override(["distillation.tokens=5"]).as_dict())
    for group in (job.distillation, dataclasses.replace(job.distillation, seed=3)):
        assert isinstance(group.sequence_length, Unasked)
        assert not asked_for(group.min_learning_rate)
    written = json.loads(json.dumps(job.as_dict()))
    assert type(written["distillation"]["sequence_length"]) is int
    assert asked_for(Job.from_dict(written).distillation.sequence_length)
    read = with_defaults_unasked(Job.from_dict(written))
    assert not asked_for(read.distillation.sequence_length)
    assert read == job


def test_a_caches_length_does_not_give_way():
    fit = Fit(Distillation(), Layout())
    fit.exactly(128, "the cache's rows have this length")
    assert fit.settings.sequence_length == 128
    fit.text(Text(100))
    assert fit.settings.sequence_length == 128
    with pytest.raises(InputError, match=r"sequence_length is 128, but the model has 64 positions .* value is 64"):
        fit.model(64)


def test_a_model_with_fewer_positions_than_the_layout_divides():
    with pytest.raises(InputError, match=r"the model has 3 positions .*; the layout needs a multiple of 8"):
        Fit(Distillation(), Layout(cp=4)).model(3)
