"""What can rot in docker/ without a Docker engine: sources of COPY, shell of RUN, versions, the smoke test itself."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.version import Version

from nemo_minitron.backend.wanted import SET_OF, SET_OF_NEMO
from nemo_minitron.hosts import host_name

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
FILES = sorted(DOCKER.glob("Dockerfile*"))
LEGAL = {"ARG", "FROM", "RUN", "ENV", "COPY", "WORKDIR", "USER", "CMD"}


def steps(file: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile; comments and continued lines as Docker reads them."""
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n", "", "\n".join(lines)).splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in whole]


def lacking():
    spec = importlib.util.spec_from_file_location("lacking", DOCKER / "lacking.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_instructions_shell_and_sources(file):
    found = steps(file)
    assert {name for name, _ in found} <= LEGAL, "an instruction of no Dockerfile: a line that lost its backslash?"
    assert [name for name, _ in found][:2] == ["ARG", "FROM"]
    for name, text in found:
        if name == "RUN":
            checked = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True)
            assert checked.returncode == 0, f"{text}\n{checked.stderr}"
            for script in re.findall(r"docker/[\w.]+", text):
                assert (ROOT / script).is_file(), script
        if name == "COPY":
            *sources, target = text.split()
            assert all((ROOT / source).exists() for source in sources), text
            assert target.startswith("/"), text


def test_what_docker_does_not_copy_is_made_anew_and_nothing_needed_is_left_out():
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)
    clean = re.search(r"^clean:\n\trm -rf (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    made = clean.replace("$(VENV)", ".venv").replace("$(BRIDGE)", ".venv-bridge").split()
    assert set(made) <= set(ignored), "what `make clean` removes, the image makes for itself"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    plain = [name for name in ignored if "*" not in name and name != ".git"]
    lost = [file for file in tracked if any(file == name or file.startswith(f"{name}/") for name in plain)]
    assert not lost, f"tracked, but not copied into the images: {lost}"


def test_the_bases_fit_the_constraints_and_the_doctor():
    constraints = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    cpu, gpu = ((DOCKER / name).read_text() for name in ("Dockerfile.cpu", "Dockerfile"))
    python = re.search(r"^ARG BASE=python:(\d+\.\d+)-slim", cpu, re.MULTILINE)[1]
    assert f"(Python {python})" in (ROOT / "constraints.txt").read_text().splitlines()[0]
    base = re.search(r"^ARG BASE=(\S+)", gpu, re.MULTILINE)[1]
    (image, *_), *containers = SET_OF_NEMO.containers
    rows = {f"{image}:{tag.split()[0]}": versions for tag, *versions in containers}
    assert base in rows
    ranges = {wanted.name: Requirement(f"{wanted.name}{wanted.range}").specifier for wanted in SET_OF_NEMO.wanted}
    for image, (nemo, megatron, engine) in rows.items():
        assert image in gpu, f"{image} of `minitron doctor` is not named in the Dockerfile"
        found = {"nemo_toolkit": nemo, "megatron-core": megatron, "transformer-engine": engine}
        assert all(version in ranges[name] for name, version in found.items()), image
    assert all(text in gpu for text in (f"NeMo {rows[base][0]}", f"Megatron-core {rows[base][1]}"))
    ours = Version(constraints["megatron-core"]).release[:2]
    assert Version(rows[base][1]).release[:2] == ours, "the base is another Megatron-core than the tests'"


def test_the_containers_of_megatron_bridge_fit_the_doctor():
    gpu = (DOCKER / "Dockerfile").read_text()
    (image, *_), *containers = SET_OF["bridge"].containers
    ranges = {wanted.name: Requirement(f"{wanted.name}{wanted.range}").specifier for wanted in SET_OF["bridge"].wanted}
    for tag, _, megatron, engine in containers:
        number = tag.split()[0]
        assert f"--build-arg BASE={image}:{number} --build-arg HOST=bridge" in gpu
        assert f"{number} has {'Megatron-core ' * (number == '26.06')}{megatron}" in gpu
        assert megatron in ranges["megatron-core"]
        assert engine in ranges["transformer-engine"]


def test_pip_adds_what_is_lacking_and_changes_nothing(tmp_path, capsys):
    module, project, host = lacking(), ROOT / "pyproject.toml", host_name()
    installed = module.versions()
    assert not module.lacking(project, host, installed), "this environment lacks nothing"
    assert module.lacking(project, host, {k: v for k, v in installed.items() if k != "scipy"}) == ["scipy"]
    held = tmp_path / "held.txt"
    assert module.main([host, "--save", str(held)]) is None
    assert capsys.readouterr().out == ""
    assert f"torch=={installed['torch']}\n" in held.read_text()
    assert module.main([host, "--compare", str(held)]) is None
    held.write_text("numpy==1.0\nnothing-of-the-kind==2\n")
    message = module.main([host, "--compare", str(held)])
    assert f"numpy was 1.0 and is {installed['numpy']}; nothing-of-the-kind was 2 and is gone" in message


@pytest.mark.parametrize("host", ["bridge", "nemo"])
def test_a_hosts_range_counts(host):
    """Of a distribution that the package and the host both name, the host's requirement alone is printed."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = lacking().lacking(ROOT / "pyproject.toml", host, {})
    own = table["optional-dependencies"][host]
    assert set(own) <= set(found)
    names = [Requirement(text).name for text in found]
    assert len(names) == len(set(names))
    assert set(names) == {Requirement(text).name for text in [*table["dependencies"], *own]}


@pytest.mark.parametrize(("host", "package"), [("bridge", "megatron-bridge"), ("nemo", "nemo-toolkit")])
def test_a_base_without_megatron_or_the_host_is_refused(host, package, tmp_path, monkeypatch):
    module = lacking()
    monkeypatch.setattr(module, "versions", lambda: {"torch": "2.9", package: "1"})
    assert "has no megatron-core" in module.main([host, "--save", str(tmp_path / "held.txt")])
    monkeypatch.setattr(module, "versions", lambda: {"torch": "2.9", "megatron-core": "1"})
    assert f"has no {package}" in module.main([host, "--save", str(tmp_path / "held.txt")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("host", ["bridge", "nemo"])
def test_the_hosts_extras_have_the_doctors_ranges(host):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][host]
    ranges = {Requirement(text).name: Requirement(text).specifier for text in extras}
    wanted = {entry.name: Requirement(f"{entry.name}{entry.range}").specifier for entry in SET_OF[host].wanted}
    both = ranges.keys() & wanted.keys()
    assert {"megatron-core", "transformers", "datasets" if host == "nemo" else "megatron-bridge"} <= both
    assert {name: ranges[name] for name in both} == {name: wanted[name] for name in both}


@pytest.mark.slow
def test_the_smoke_test_passes_here():
    assert subprocess.run(["sh", "-n", str(DOCKER / "smoke_test.sh")]).returncode == 0
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    assert shutil.which("minitron", path=environment["PATH"]), "the package is not installed"
    run = subprocess.run(
        ["sh", str(DOCKER / "smoke_test.sh")], capture_output=True, text=True, env=environment, cwd="/"
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "all is well" in run.stdout
    assert "scored and cut to 15,968 parameters" in run.stdout  # of 26,784: one of two layers, 48 of 64 neurons
