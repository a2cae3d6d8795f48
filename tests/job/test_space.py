"""What a run still needs of its disk: what lies there already counts, and what is done needs nothing more."""

import dataclasses

import pytest
from pico import pico_llama

from nemo_minitron.artifacts import Manifest
from nemo_minitron.artifacts.files import bytes_in
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf, read_config
from nemo_minitron.job import Cutting, Data, Job
from nemo_minitron.job import dry_run as module
from nemo_minitron.job.dry_run import check_space, parts_of, space, space_left


@pytest.fixture
def job(tmp_path):
    pico_llama(tmp_path / "teacher")
    return Job(name="pico", teacher=str(tmp_path / "teacher"), data=Data("a", "b"), keep={"ffn": 64})


def test_what_lies_there_counts_for_its_own_part_alone(job, tmp_path):
    config, run = read_config(job.teacher), tmp_path / "run"
    parts = {place: size for (_, place), size in parts_of(job, config).items()}
    assert space_left(job, config, run) == space(job, config) == sum(parts.values())
    half = parts["checkpoints/distilled"] // 2
    (run / "checkpoints" / "distilled").mkdir(parents=True)
    (run / "checkpoints" / "distilled" / "chunk").write_bytes(bytes(half))
    there = bytes_in(run)
    assert half <= there < half + 4096
    assert space_left(job, config, run) == space(job, config) - there
    (run / "checkpoints" / "distilled" / "more").write_bytes(bytes(2 * half))
    assert space_left(job, config, run) == space(job, config) - parts["checkpoints/distilled"]


def test_a_rotated_teacher_is_one_more_copy(job):
    config, teacher = read_config(job.teacher), from_hf(job.teacher).parameters()
    rotated = dataclasses.replace(job, keep={"hidden": 40}, cutting=Cutting(rotate=True))
    assert parts_of(rotated, config)["rotate", "checkpoints/rotated"] == 2 * teacher
    assert not parts_of(job, config)["rotate", "checkpoints/rotated"]


def test_finished_stages_need_nothing(job, tmp_path):
    config, run = read_config(job.teacher), tmp_path / "run"
    run.mkdir()
    manifest = Manifest.open(run / "manifest.json")
    for stage in ("prune", "distill", "export"):
        manifest.finish(stage, 1.0, "d")
    assert space_left(job, config, run) == parts_of(job, config)["compensate", "search"]


def test_a_run_that_filled_its_disk_goes_on_there(job, tmp_path, monkeypatch):
    config, run = read_config(job.teacher), tmp_path / "run"
    needed = space(job, config)
    free = lambda size: monkeypatch.setattr(module, "need_space", lambda folder, wanted: _need(size, wanted))  # noqa: E731
    free(needed - 1)
    with pytest.raises(InputError, match="too small"):
        check_space(job, run)
    (run / "checkpoints" / "pruned").mkdir(parents=True)
    (run / "checkpoints" / "pruned" / "model.safetensors").write_bytes(bytes(20_000))
    check_space(job, run)


def _need(free, wanted):
    if wanted > free:
        raise InputError("too small")
