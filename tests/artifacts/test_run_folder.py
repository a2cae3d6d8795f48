"""Names of a run's files: paths on an object, names within the folder on the class."""

from pathlib import Path

from nemo_minitron.artifacts.run_folder import CandidateFolder, Name, RoundFolder, RunFolder, TrainingFolder


def test_a_name_is_a_path_on_an_object_and_a_name_on_the_class():
    run = RunFolder("runs/demo")
    assert run.plan == Path("runs/demo/plan.json")
    assert RunFolder.plan == "plan.json"
    assert run.card == Path("runs/demo/student/README.md")
    assert Path(run) == Path(str(run)) == Path("runs/demo")


def test_folders_in_a_run():
    run = RunFolder("run")
    assert run.candidate("a").plan == Path("run/search/a/plan.json")
    assert run.round(2).scores == Path("run/rounds/2/scores.safetensors")
    assert run.step("half").student == Path("run/half/student")
    assert TrainingFolder(run.distilled).nemo == Path("run/checkpoints/distilled/nemo/checkpoints")


def test_no_two_names_are_one_file():
    for kind in (RunFolder, CandidateFolder, RoundFolder, TrainingFolder):
        names = [value.name for part in kind.__mro__ for value in vars(part).values() if isinstance(value, Name)]
        assert len(names) == len(set(names))
