"""The order of stages: what is done is skipped, what changed is done again, a failure leaves what was done."""

import dataclasses
import json
import os

import pytest
from pico_order import pico_order

from nemo_minitron.errors import InputError
from nemo_minitron.job import Data, Job
from nemo_minitron.job.run import Stage, check_recipe, execute, open_run
from nemo_minitron.launch.torchrun import launch

JOB = Job(name="pico", teacher="t", data=Data("a", "b"), keep={"ffn": 64})


def stages(done, fail=()):
    def stage(name, after=(), inputs=lambda run: None):
        def work(run):
            if name in fail:
                raise RuntimeError(name)
            done.append(name)
            run.path(f"{name}.txt").write_text(name)

        return Stage(name, work, inputs, after, (f"{name}.txt",))

    return [
        stage("one", inputs=lambda run: run.job.calibration.samples),
        stage("two", ("one",)),
        stage("three", inputs=lambda run: run.job.seed),
    ]


def test_a_rerun_skips_what_is_done(tmp_path):
    done = []
    for _ in range(2):
        execute(open_run(JOB, tmp_path / "run"), stages(done))
    assert done == ["one", "two", "three"]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [stage["name"] for stage in manifest["stages"]] == done
    assert all(set(stage) == {"name", "seconds", "digest"} for stage in manifest["stages"])


def test_a_change_reaches_downstream_alone(tmp_path):
    done = []
    execute(open_run(JOB, tmp_path / "run"), stages(done))
    execute(open_run(JOB.override(["calibration.samples=3"]), tmp_path / "run"), stages(done))
    assert done == ["one", "two", "three", "one", "two"]


def test_there_and_back_again_does_not_trust_files_of_the_way(tmp_path):
    """Run A, break off B after its first stage, run A: what rested on B's files is made again."""
    done = []
    execute(open_run(JOB, tmp_path / "run"), stages(done))
    other = JOB.override(["calibration.samples=3"])
    with pytest.raises(RuntimeError, match="two"):
        execute(open_run(other, tmp_path / "run"), stages(done, fail=("two",)))
    execute(open_run(JOB, tmp_path / "run"), stages(done))
    assert done == ["one", "two", "three", "one", "one", "two"]


def test_a_missing_output_is_made_again(tmp_path):
    done = []
    execute(open_run(JOB, tmp_path / "run"), stages(done))
    (tmp_path / "run" / "two.txt").unlink()
    execute(open_run(JOB, tmp_path / "run"), stages(done))
    assert done == ["one", "two", "three", "two"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: os.truncate(file, 1), "has 1 of its 3 bytes"),
        (lambda file: file.write_text("TWO"), "was changed"),
        (lambda file: file.unlink(), "is gone"),
    ],
)
def test_a_damaged_output_is_made_again_and_named(tmp_path, capsys, change, said):
    done, file = [], tmp_path / "run" / "two.txt"
    execute(open_run(JOB, tmp_path / "run"), stages(done))
    change(file)
    execute(open_run(JOB, tmp_path / "run"), stages(done))
    assert done == ["one", "two", "three", "two"]
    assert f"[2/3] two: done before, but {file} {said}" in capsys.readouterr().out
    assert file.read_text() == "two"


def test_everything_a_stage_left_counts_and_no_stage_trusts_damaged_files(tmp_path):
    """A folder whole; what is damaged is gone when the stage runs again, so that it cannot go on from there."""
    seen = []

    def work(run):
        run.path("made").mkdir(exist_ok=True)
        seen.append(sorted(path.name for path in run.path("made").iterdir()))
        for name in ("a", "b"):
            run.path("made", name).write_text(name)

    stage = Stage("make", work, lambda run: None, (), (), lambda run: ["made"])
    for _ in range(2):
        execute(open_run(JOB, tmp_path / "run"), [stage])
    (tmp_path / "run" / "made" / "b").write_text("c")
    execute(open_run(JOB, tmp_path / "run"), [stage])
    assert seen == [[], ["a"]]


def test_what_rests_on_a_stage_that_is_done_again_does_not_trust_damaged_files_either(tmp_path):
    done, run = [], tmp_path / "run"
    execute(open_run(JOB, run), stages(done))
    for name in ("one.txt", "two.txt"):
        (run / name).write_text("?")
    with pytest.raises(RuntimeError, match="one"):
        execute(open_run(JOB, run), stages(done, fail=("one",)))
    assert sorted(path.name for path in run.glob("*.txt")) == ["log.txt", "three.txt"]


def test_a_run_of_an_earlier_version_is_taken_as_it_is_and_sealed(tmp_path):
    done, manifest = [], tmp_path / "run" / "manifest.json"
    execute(open_run(JOB, tmp_path / "run"), stages(done))
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "files": {}}))
    execute(open_run(JOB, tmp_path / "run"), stages(done))
    assert done == ["one", "two", "three"]
    assert sorted(json.loads(manifest.read_text())["files"]) == ["one.txt", "three.txt", "two.txt"]


def test_another_recipe_is_refused_in_a_used_folder(tmp_path):
    """Other settings, or another teacher; not another layout, nor the same folder by its absolute name."""
    run, done = tmp_path / "run", []
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    job = dataclasses.replace(JOB, teacher=str(teacher))
    check_recipe(job, run)
    execute(open_run(job, run), stages(done))
    before = {path: path.read_bytes() for path in run.iterdir()}
    check_recipe(job.override(["layout.tp=2"]), run)
    check_recipe(dataclasses.replace(job, teacher=os.path.relpath(teacher)), run)
    taught = dataclasses.replace(job, learns_from=str(teacher), lineage=[str(teacher), "a"])
    execute(open_run(taught, tmp_path / "taught"), stages([]))
    moved = dataclasses.replace(taught, lineage=[os.path.relpath(teacher), "b"])
    with pytest.raises(InputError, match=r"recipe: lineage.1 is \"a\" there and \"b\" here; give"):
        check_recipe(moved, tmp_path / "taught")
    with pytest.raises(InputError, match=r"keep.ffn is 64 there and 32 here; give another folder.*or --overwrite"):
        check_recipe(job.override(["keep.ffn=32"]), run)
    with pytest.raises(InputError, match=r"name is .*, and 2 more settings; give"):
        check_recipe(job.override(["name=x", "seed=3", "distillation.loss=mse"]), run)
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_a_recipe_that_failed_before_its_first_stage_may_be_mended(tmp_path):
    with pytest.raises(RuntimeError, match="one"):
        execute(open_run(JOB, tmp_path / "run"), stages([], fail=("one",)))
    check_recipe(JOB.override(["keep.ffn=32"]), tmp_path / "run")


def test_a_recipe_of_an_earlier_version_is_the_same_with_its_defaults(tmp_path):
    execute(open_run(JOB, tmp_path / "run"), stages([]))
    file = tmp_path / "run" / "recipe.json"
    values = json.loads(file.read_text())
    del values["distillation"]["loss"]
    file.write_text(json.dumps(values))
    check_recipe(JOB, tmp_path / "run")
    with pytest.raises(InputError, match=r"distillation.loss is \"forward_kl\" there and \"mse\" here"):
        check_recipe(JOB.override(["distillation.loss=mse"]), tmp_path / "run")


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{}")
    (tmp_path / "run" / "log.txt").symlink_to("/dev/full")
    done = []
    execute(open_run(JOB, tmp_path / "run"), stages(done))
    assert done == ["one", "two", "three"]


def test_a_failure_keeps_what_was_done(tmp_path):
    done = []
    with pytest.raises(RuntimeError, match="two"):
        execute(open_run(JOB, tmp_path / "run"), stages(done, fail=("two",)))
    execute(open_run(JOB, tmp_path / "run"), stages(done))
    assert done == ["one", "two", "three"]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(InputError, match="not empty and is no run folder"):
        open_run(JOB, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]
    with pytest.raises(InputError, match="is a file"):
        open_run(JOB, tmp_path / "photo.jpg")


WORKER = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as the package's worker: torchrun ignores it
rank = int(os.environ["RANK"])
if sys.argv[1] == "all refuse":
    Path(os.environ["MINITRON_ERRORS"], f"refused-{rank}").write_text(f"rank {rank} has no data")
    os._exit(2)
if sys.argv[1] == "refuse" and rank == 1:
    Path(os.environ["MINITRON_ERRORS"], "refused-1").write_text("the second rank has no data")
    os._exit(2)
if sys.argv[1] == "crash" and rank == 1:
    raise ValueError("broken in rank 1")
if sys.argv[1] != "work":
    time.sleep(600)
os.write(1, f"  > step {rank}\\n".encode())  # one write: lines of two ranks do not mix
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "error", "words"),
    [("refuse", InputError, "the second rank has no data"), ("crash", RuntimeError, "exit code 1.*broken in rank 1")],
)
def test_one_ranks_failure_ends_all_with_its_message(stage, error, words, tmp_path, monkeypatch):
    """The other rank sleeps for ten minutes: the test's own timeout would end it."""
    (tmp_path / "pico_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(error, match=f"(?s){words}"):
        launch(pico_order(stage, 2), "pico_worker", tmp_path / "log.txt")


@pytest.mark.slow
def test_ranks_that_all_refuse_give_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "pico_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(InputError) as caught:
        launch(pico_order("all refuse", 2), "pico_worker", tmp_path / "log.txt")
    assert str(caught.value) in ("rank 0 has no data", "rank 1 has no data")


@pytest.mark.slow
def test_progress_reaches_the_screen_and_everything_the_log(tmp_path, monkeypatch, capfd):
    (tmp_path / "pico_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    launch(pico_order("work", 2), "pico_worker", tmp_path / "log.txt")
    assert sorted(capfd.readouterr().out.split("> step ")[1:]) == ["0\n", "1\n"]
    assert "step 0" in (tmp_path / "log.txt").read_text()


def test_as_far_as_a_stage_and_on(tmp_path):
    """What a stage does not rest on is left to a later call, which finds what is done."""
    done = []
    execute(open_run(JOB, tmp_path / "run"), stages(done), until="two")
    assert done == ["one", "two"]
    execute(open_run(JOB, tmp_path / "run"), stages(done))
    assert done == ["one", "two", "three"]
    execute(open_run(JOB.override(["calibration.samples=3"]), tmp_path / "run"), stages(done), until="one")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [stage["name"] for stage in manifest["stages"]] == ["three", "one"]
