"""`nemo minitron`: the entry point, the recipes as factories, and a run through NeMo-Run's local executor."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from command_line import minitron
from pico import raw_tensors

from nemo_minitron.cli.find import find, names
from nemo_minitron.job import Job

pytestmark = pytest.mark.slow
COMMANDS = ("compress", "estimate", "plan", "prune", "distill")


@pytest.fixture(scope="module")
def said(world):
    """What `nemo minitron` prints; its run goes on from a copy of `minitron compress`'s that has only its plan.

    Its processes are started, not forked, and find a Transformer Engine that does not import, as its package does on a
    machine without a GPU.
    """
    shutil.copytree(world / "run", world / "by-nemo")
    for folder in ("checkpoints", "student"):
        shutil.rmtree(world / "by-nemo" / folder)
    for file in ("compensation.safetensors", "log.txt"):  # other tests' reruns may have written to the log
        (world / "by-nemo" / file).unlink()
    engine = world / "site" / "transformer_engine"
    engine.mkdir(parents=True)
    (engine / "__init__.py").write_text("raise RuntimeError('libcuda.so.1: cannot open shared object file')")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # its executors start `python`
    # 200 columns: NeMo-Run cuts the longer names of recipes to fit a narrow terminal.
    environment = os.environ | {"NEMORUN_HOME": str(world / "nemo-run"), "PATH": path, "COLUMNS": "200"}
    environment["PYTHONPATH"] = os.pathsep.join([str(engine.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(Path(__file__).with_name("nemo_command.py"))]
    done = subprocess.run(command, cwd=world, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    result = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(result.removeprefix("RESULT"))


def test_pip_installs_the_entry_point():
    (point,) = importlib.metadata.entry_points(group="nemo_run.cli", name="minitron")
    assert point.value == "nemo_minitron.cli.nemo_run"


def test_the_plugin_loads_no_more_than_nemo_run_does(said):
    assert said["heavy"] == []


def test_help_lists_the_commands_and_the_recipes(said):
    code, text = said["commands"]
    assert code == 0
    assert all(f" {command} " in text for command in COMMANDS)
    code, text = said["factories"]
    assert code == 0
    assert [name for name in [*names(), "pico"] if name not in text] == []


def test_dryrun_prints_the_resolved_settings(said):
    code, text = said["dryrun"]
    assert code == 0
    assert "Dry run for task nemo_minitron.cli.nemo_run:estimate" in text
    assert "tokens=2000" in text
    code, text = said["unknown"]
    assert code == 1
    assert "No parameter named 'tokns'" in text


def _job(file):
    """The Job of a file that NeMo-Run wrote."""

    def plain(value):
        if not isinstance(value, dict):
            return value
        return {name: plain(inner) for name, inner in value.items() if not name.startswith("_")}

    values = plain(yaml.safe_load(file.read_text()))
    assert values.pop("out") is None
    return Job.from_dict(values)


def test_yaml_holds_the_job_and_is_read_again(said, world, monkeypatch):
    monkeypatch.chdir(world)  # a recipe names the demo's files as they are found from here
    expected = find("smollm2_135m_to_108m_width").override(
        ["distillation.tokens=2000", "keep.ffn=1280", "layout.sp=true", 'evaluation.prompts=["a b","c"]']
    )
    assert (said["yaml"][0], said["again"][0]) == (0, 0), said["again"][1]
    assert _job(world / "job.yaml") == expected
    assert _job(world / "again.yaml") == expected.override(["seed=3"])


def test_a_run_through_the_local_executor_is_the_same_run(said, world):
    """Every stage before finds its digest, so the Job came through whole; the student is the same, bit for bit."""
    assert said["run"][0] == 0, said["run"][1]
    log = (world / "by-nemo" / "log.txt").read_text()
    skipped = re.findall(r"\] (\S+): done before, skipped", log)
    assert skipped == ["data", "estimate", "plan", "gates"]  # what the matrices and the student rest on
    ours, theirs = raw_tensors(world / "run" / "student"), raw_tensors(world / "by-nemo" / "student")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []


@pytest.mark.long
def test_minitron_hands_its_own_run_to_an_executor(said, world, monkeypatch):
    """What `nemo minitron` made is done before; the rest of the job follows."""
    monkeypatch.setenv("NEMORUN_HOME", str(world / "nemo-run"))
    folder = world / "by-nemo"
    for file in ("report.html", "log.txt"):
        (folder / file).unlink()
    minitron(world, "compress", "recipe.py", "--out", "by-nemo", "--executor", "local")
    skipped = re.findall(r"\] (\S+): done before, skipped", (folder / "log.txt").read_text())
    assert skipped == ["data", "estimate", "plan", "gates", "compensate", "prune", "distill", "export"]
    assert (world / "nemo-run" / "experiments" / "pico").is_dir()  # NeMo-Run's record of it
    assert (folder / "report.html").exists()


def test_under_torchrun_the_first_process_alone_does_the_job(said, world):
    """The others leave at once, having made nothing; a number that is not the layout's is refused in a sentence."""
    code, text = said["three for one"]
    assert code == 1
    assert "NeMo-Run started 3 processes; the layout has 1" in text
    assert said["not the first"][0] == 0, said["not the first"][1]
    assert not (world / "none").exists()
