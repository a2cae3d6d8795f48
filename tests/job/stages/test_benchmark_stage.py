"""The benchmarks' stage: when a job has it, and what it leaves in the run folder."""

import dataclasses
import json
import sys

import pytest
from pico import pico_llama

from nemo_minitron.artifacts import Manifest
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.errors import InputError
from nemo_minitron.job import Data, Evaluation, Job
from nemo_minitron.job.dry_run import check, describe
from nemo_minitron.job.run import Run
from nemo_minitron.job.stages.benchmark import measure
from nemo_minitron.job.stages.compress import stages


@pytest.fixture
def job(tmp_path):
    folder = pico_llama(tmp_path / "teacher")
    return Job("pico", str(folder), Data("a", "b"), keep={"ffn": 64}, evaluation=Evaluation(benchmarks=("instruct",)))


def test_a_job_with_benchmarks_measures_both_models(job, tmp_path, monkeypatch, capsys):
    asked = []

    def run_tasks(folder, tasks, **options):
        asked.append((folder, tasks, options))
        return {"ifeval": {"acc,none": len(asked) / 10}}

    monkeypatch.setattr("nemo_minitron.evaluation.run_tasks", run_tasks)
    measure(Run(job, RunFolder(tmp_path), Manifest(tmp_path / "manifest.json")))
    assert json.loads((tmp_path / "benchmarks.json").read_text()) == {
        "teacher": {"ifeval": {"acc,none": 0.1}}, "distilled": {"ifeval": {"acc,none": 0.2}},
    }  # fmt: skip
    assert [row[:2] for row in asked] == [(tmp_path / part, ("instruct",)) for part in ("teacher", "student")]
    assert asked[0][2] == {"precision": "bf16", "batch_size": 4}
    assert capsys.readouterr().out.split() == ["ifeval", "acc,none", "0.1", "0.2"]


def test_the_stage_is_there_only_where_benchmarks_are_named(job):
    names = [stage.name for stage in stages(job)]
    assert names[-3:] == ["evaluate student", "benchmarks", "report"]
    without = dataclasses.replace(job, evaluation=Evaluation())
    assert "benchmarks" not in [stage.name for stage in stages(without)]
    assert "  IFEval: lm-eval's ifeval" in describe(job)
    assert "  BFCL: lm-eval has none" in describe(job)
    assert "benchmarks of" not in describe(without)


def test_what_could_not_be_measured_is_refused_before_anything_runs(job, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match="tasks need lm-eval"):
        check(job)
    with pytest.raises(InputError, match="benchmark 'IFEvil' is unknown; did you mean 'IFEval'"):
        describe(job.override(["evaluation.benchmarks=IFEvil"]))
