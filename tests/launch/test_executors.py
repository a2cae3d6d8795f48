"""`--executor`: the tests read what NeMo-Run would get. There is no cluster and no container here to run it."""

import io
import subprocess
import sys

import pytest

from nemo_minitron.errors import InputError
from nemo_minitron.settings.layout import Layout

pytestmark = pytest.mark.slow  # NeMo-Run's import
COMMAND = ["compress", "recipe.py", "keep.ffn=66", "--out", "/shared/runs/pico"]
LAYOUT = Layout(tp=4, dp=4)
SLURM = ["account=lab", "partition=gpu", "container_image=image", "container_mounts=/data:/data,/hub:/hub"]


@pytest.fixture
def executors(tmp_path, monkeypatch):
    from nemo_run import config

    from nemo_minitron.launch import executors

    monkeypatch.setattr(config, "_NEMORUN_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # NeMo-Run's shell reads it
    return executors


def flags(script):
    return dict(line[len("#SBATCH --") :].partition("=")[::2] for line in script.splitlines() if "#SBATCH" in line)


def test_the_batch_script(executors, tmp_path):
    settings = [f"executor.{setting}" for setting in (*SLURM, "retries=3", "time=08:00:00", "env_vars.A=b c")]
    executor = executors.executor_of("slurm", settings, LAYOUT, [tmp_path])
    text = executors.dry_run(executor, "pico", COMMAND)
    (file,) = (tmp_path / "home").rglob("pico_sbatch.sh")
    assert file.read_text().rstrip() in text
    assert f"sbatch --requeue --parsable {file}" in text
    found = flags(file.read_text())
    wanted = {"account": "lab", "partition": "gpu", "nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "8"}
    assert {name: found[name] for name in wanted} == wanted
    assert (found["time"], found["signal"]) == ("08:00:00", "TERM@120")
    assert "export TORCHX_MAX_RETRIES=3" in text
    assert "export A='b c'" in text
    mounts = f"--container-mounts {tmp_path}:{tmp_path},/data:/data,/hub:/hub,"
    assert f"--container-image image {mounts}" in text
    (inside,) = (tmp_path / "home").rglob("scripts/pico.sh")
    assert inside.read_text().splitlines()[1:] == [f"cd {tmp_path}", "exec minitron " + " ".join(COMMAND)]
    assert subprocess.run(["bash", "-n", str(file)]).returncode == 0


@pytest.mark.parametrize("host", ["", "bridge"])
def test_the_host_that_is_named_here_is_named_there(executors, tmp_path, monkeypatch, host):
    monkeypatch.setenv("MINITRON_HOST", host)
    executors.dry_run(executors.executor_of("slurm", SLURM, LAYOUT, [tmp_path]), "pico", COMMAND)
    (inside,) = (tmp_path / "home").rglob("scripts/pico.sh")
    lines = inside.read_text().splitlines()
    assert lines[-1] == "exec minitron " + " ".join(COMMAND)
    assert lines[2:-1] == (["export MINITRON_HOST=bridge"] if host else [])


def test_the_time_limit_follows_the_estimate(executors):
    assert executors.executor_of("slurm", ["account=lab"], LAYOUT, []).time == "04:00:00"
    assert executors.executor_of("slurm", ["account=lab"], LAYOUT, [], 6.2).time == "11:00:00"
    assert executors.executor_of("slurm", ["account=lab"], LAYOUT, [], 26.6).time == "1-17:00:00"
    assert executors.executor_of("slurm", ["account=lab", "time=00:30:00"], LAYOUT, [], 26.6).time == "00:30:00"


def test_a_cluster_without_gpus_and_containers(executors, tmp_path):
    executor = executors.executor_of("slurm", ["account=lab", "nodes=4", "gpus_per_node=0"], LAYOUT, [tmp_path])
    text = executors.dry_run(executor, "pico", COMMAND)
    assert "--gpus" not in text
    assert flags(text)["nodes"] == "4"
    assert f"exec {sys.executable} -m nemo_minitron.cli compress" in text


def test_the_container_command(executors, tmp_path):
    settings = ["container_image=nvcr.io/nvidia/nemo:25.11", "volumes=/data:/data", "shm_size=16g"]
    executor = executors.executor_of("docker", settings, LAYOUT, [tmp_path])
    line = executors.dry_run(executor, "pico", COMMAND).splitlines()[-1]
    assert line.startswith("docker run --rm ")
    for words in ("--gpus 16", "--ipc host", "--shm-size 16g", f"-v {tmp_path}:{tmp_path} -v /data:/data"):
        assert words in line
    assert line.endswith("nvcr.io/nvidia/nemo:25.11 bash /nemo_run/scripts/pico.sh")


def test_a_text_stays_one_though_it_looks_like_a_number(executors):
    executor = executors.executor_of("slurm", ["account=007", "time=30", "exclusive=true"], LAYOUT, [])
    assert (executor.account, executor.time, executor.exclusive) == ("007", "30", True)


def test_an_executor_of_ones_own(executors, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "executors.py").write_text(
        "import nemo_run as run\ndef lab():\n    return run.SlurmExecutor(account='lab', env_vars={'A': '1'})\n"
    )
    executor = executors.executor_of("lab", ["nodes=4", "env_vars.B=2"], LAYOUT, [])
    assert (executor.account, executor.nodes) == ("lab", 4)
    assert {name: executor.env_vars[name] for name in "AB"} == {"A": "1", "B": "2"}


def test_each_start_of_a_batch_job_makes_a_secret_of_its_own(executors, tmp_path):
    text = executors.dry_run(executors.executor_of("slurm", ["account=lab"], LAYOUT, [tmp_path]), "pico", COMMAND)
    (line,) = (line for line in text.splitlines() if "MINITRON_SECRET" in line)
    said = {subprocess.check_output(["bash", "-c", f"{line}; printf %s $MINITRON_SECRET"], text=True) for _ in "ab"}
    assert [len(secret) for secret in said] == [32, 32]


EVIL = "x$(touch ran)`touch ran`;touch ran;' \" touch ran #"


def test_values_are_words_of_the_shell(executors, tmp_path):
    """An argument, a variable, an account and a folder would each make a file if the shell ran them."""
    folder = tmp_path / "a $(touch ran)"
    folder.mkdir()
    settings = [f"account={EVIL}", f"env_vars.A={EVIL}", "container_image=image"]
    executor = executors.executor_of("slurm", settings, LAYOUT, [folder])
    text = executors.dry_run(executor, "pico", ["compress", "recipe.py", f"data.train={EVIL}"])
    (batch,) = (tmp_path / "home").rglob("pico_sbatch.sh")
    (inside,) = (tmp_path / "home").rglob("scripts/pico.sh")
    stubs = "srun() { :; }; scontrol() { :; }; exec() { :; }; "
    for file in (batch, inside):
        subprocess.run(["bash", "-c", stubs + file.read_text()], cwd=tmp_path, capture_output=True)
    assert text
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize("name", [EVIL, "a b", "../../x", "$(id)", ""])
def test_a_task_has_a_plain_name(executors, tmp_path, name):
    executor = executors.executor_of("slurm", ["account=lab"], LAYOUT, [tmp_path])
    for hand_over in (executors.dry_run, executors.submit):
        with pytest.raises(InputError, match="the task's name"):
            hand_over(executor, name, COMMAND)
    assert not (tmp_path / "home").exists()


def test_a_home_that_is_no_word_is_refused(executors, tmp_path, monkeypatch):
    from nemo_run import config

    monkeypatch.setattr(config, "_NEMORUN_HOME", str(tmp_path / "my $(home)"))
    with pytest.raises(InputError, match="would need quotes in a batch script"):
        executors.executor_of("slurm", ["account=lab"], LAYOUT, [tmp_path])


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("slurm", [], r"needs executor\.account"),
        ("slurm", ["account=lab", "partitoin=gpu"], "did you mean 'partition'"),
        ("slurm", ["account=lab", "nodes=3"], "16 processes do not divide over 3 nodes"),
        ("slurm", ["account"], "executor.key=value"),
        ("slrum", [], "did you mean 'slurm'"),
        ("docker", [], r"needs executor\.container_image"),
        ("docker", ["container_image=i", "num_gpus=x"], r"executor\.num_gpus is 'x'; it must be int"),
        ("slurm", ["account=lab", "nodes=two"], r"executor\.nodes is 'two'; it must be int"),
        ("slurm", ["account=lab\ntouch ran"], r"executor\.account is 'lab\\ntouch ran'; it must be one line"),
        ("slurm", ["account=lab", "env_vars.A;id=1"], "names 'A;id'; a variable must have letters"),
        ("skypilot", [], r"pip install 'nemo_run\[skypilot\]'"),
    ],
)
def test_refusals(executors, name, settings, words):
    with pytest.raises(InputError, match=words):
        executors.executor_of(name, settings, LAYOUT, [])
