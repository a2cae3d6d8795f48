"""What every host must do (`hosts.protocol`), run for each host that is installed here."""

import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import forked
import pytest
from forked import Forked
from pico import pico_llama, pico_qwen3, raw_tensors
from tolerances import LOGITS_PICO_FP32
from words import save_tokenizer

from nemo_minitron import hosts
from nemo_minitron.backend import versions

WORKER = Path(__file__).with_name("contract_worker.py")
FAMILIES = Path(__file__).with_name("families_worker.py")
LOGITS_FP32 = 1e-4
TEXTS = [f"the model number {i} reads {i * 7} words and the next {'word ' * (i % 9)}ends." for i in range(200)]
STEPS = 60  # of the distillation


def installed(distribution):
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def run(*command, host):
    environment = os.environ | {"MINITRON_HOST": host}
    return forked.run([sys.executable, *command], env=environment)


class HostContract:
    host: str

    @pytest.mark.slow
    @pytest.mark.parametrize("family", [pico_llama, pico_qwen3])
    def test_a_model_filled_by_reading_equals_transformers(self, tmp_path, family):
        done = run(WORKER, self.host, family(tmp_path / "model"), host=self.host)
        assert done.returncode == 0, done.stderr[-3000:]
        assert float(done.stdout.split("error ")[-1]) < LOGITS_FP32

    @pytest.mark.slow
    def test_a_student_is_distilled_told_to_stop_and_resumed(self, tmp_path):
        """The rows of loss.csv are those of a training without a stop; the student is a plain folder."""
        for name, layers in (("teacher", 4), ("student", 3)):
            pico_llama(tmp_path / name, vocab_size=509, num_hidden_layers=layers, seed=layers)
            save_tokenizer(tmp_path / name, TEXTS, 509)
        (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
        whole, halted = self.distilled(tmp_path, "whole"), tmp_path / "halted"
        losses = tmp_path / ".halted.work" / "training" / "loss.csv"
        process = self.distilling(tmp_path, "halted")
        deadline = time.monotonic() + 300
        while (not losses.exists() or losses.read_text().count("\n") < 4) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
        output = process.communicate(timeout=300)[0]
        assert (process.returncode, "told to stop, saved" in output) == (143, True), output[-3000:]
        before = losses.read_text().splitlines()
        assert 4 <= len(before) < STEPS
        assert self.distilled(tmp_path, "halted") == whole
        after = (halted / "loss.csv").read_text().splitlines()
        assert after[: len(before)] == before
        assert len(after) == STEPS + 1

    def distilled(self, folder, out):
        """Runs a distillation to its end. Returns its losses, and the student's tensors as bytes."""
        process = self.distilling(folder, out)
        output = process.communicate(timeout=600)[0]
        assert process.returncode == 0, output[-3000:]
        rows = [line.split(",")[:3] for line in (folder / out / "loss.csv").read_text().splitlines()]
        return rows, {name: tensor.tobytes() for name, tensor in raw_tensors(folder / out).items()}

    def distilling(self, folder, out):
        command = (
            f"-m nemo_minitron.cli distill student --teacher teacher --data text.jsonl --out {out} --precision fp32 "
            f"--tokens {STEPS * 4 * 24} --sequence-length 24 --global-batch-size 4 --save-every 1000 --warmup-steps 2"
        )
        environment = os.environ | {"MINITRON_HOST": self.host}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return Forked([sys.executable, *command.split()], cwd=folder, env=environment, text=True, **streams)

    def test_its_entry_is_light(self):
        code = "from nemo_minitron.hosts import host_of; import sys; print(host_of().name, 'torch' in sys.modules)"
        assert run("-c", code, host=self.host).stdout.split() == [self.host, "False"]


@pytest.mark.skipif(not installed("nemo_toolkit"), reason="NeMo is not installed here")
class TestNeMo(HostContract):
    host = "nemo"


@pytest.mark.skipif(not installed("megatron-bridge"), reason="Megatron-Bridge is not installed here")
class TestBridge(HostContract):
    host = "bridge"

    @pytest.mark.slow
    def test_every_family_equals_transformers_or_is_refused(self, tmp_path):
        """Windows, dense layers of a mixture, biases and scaled positions too, which Bridge alone leaves out. The
        tables of the families left out of `hosts/bridge/models.py`, eleven of these models are wrong or refused."""
        done = run(FAMILIES, tmp_path, host=self.host)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        refused = {line["name"]: line["refused"] for line in lines if "refused" in line}
        assert list(refused) == ["llama-own"]
        assert "old_context_len 16, and Megatron-Bridge's is always 8192; give --host nemo" in refused["llama-own"]
        assert len(lines) > 20
        wrong = {line["name"]: line for line in lines if line.get("error", 0) > LOGITS_PICO_FP32}
        assert wrong == {}


@pytest.mark.parametrize("name", ["nemo", "bridge", "other"])
def test_a_host_that_is_not_here_is_refused_in_one_sentence(name):
    if installed({"nemo": "nemo_toolkit", "bridge": "megatron-bridge"}.get(name, "") or "no-such-distribution"):
        pytest.skip(f"{name} is installed here")
    done = run("-m", "nemo_minitron.cli", "doctor", "--host", name, host="")
    assert done.returncode == 2
    assert done.stderr.startswith(f"minitron: the host '{name}' is ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("here", "named", "name", "because"),
    [
        (("nemo",), "", "nemo", "it is the one that is installed"),
        (("bridge",), "", "bridge", "it is the one that is installed"),
        (("bridge", "nemo"), "", "nemo", "both are installed, and nothing names one"),
        (("bridge", "nemo"), "bridge", "bridge", "--host or MINITRON_HOST names it"),
        ((), "", "nemo", "no host is installed"),
    ],
)
def test_why_it_is_this_host(here, named, name, because, monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda package: package in {hosts.PACKAGES[host] for host in here})
    monkeypatch.setenv("MINITRON_HOST", named)
    assert hosts.chosen() == (name, because)


WITHOUT = """
import sys
from nemo_minitron import cli
from nemo_minitron.backend import versions
versions.installed = lambda name: None
sys.argv[1:] = {arguments!r}
cli.main()
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["estimate", "MODEL", "--data", "TEXT", "--out", "OUT"],
        ["cache-logits", "MODEL", "--data", "TEXT", "--out", "OUT"],
        ["distill", "MODEL", "--teacher", "MODEL", "--data", "TEXT", "--out", "OUT"],
        ["finetune", "MODEL", "--data", "TEXT", "--out", "OUT"],
        ["compress", "smollm2_135m_to_108m_width", "--out", "OUT"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_without_a_host_a_command_says_how_to_install_one(arguments, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"input": "one", "output": "two", "text": "three"}\n')
    places = {"MODEL": str(pico_llama(tmp_path / "model")), "OUT": str(tmp_path / "out")}
    places["TEXT"] = str(tmp_path / "text.jsonl")
    code = WITHOUT.format(arguments=[places.get(word, word) for word in arguments])
    done = run("-c", code, host="")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("minitron: no host is installed here; install NeMo 2 with: pip install 'nemo_mini")
    assert "nemo_minitron[bridge]" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"model", "text.jsonl"}


def test_without_nemo_run_an_executor_says_how_to_install_it():
    arguments = ["compress", "llama31_8b_to_4b_width", "--executor", "slurm", "executor.account=lab", "--dry-run"]
    done = run("-c", WITHOUT.replace("import sys", "import sys; sys.modules['nemo_run'] = None").format(
        arguments=arguments), host="")  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr == "minitron: --executor needs NeMo-Run; install it with: pip install nemo_run 'leptonai<0.28'\n"


def test_without_a_host_a_dry_run_runs():
    code = WITHOUT.format(arguments=["compress", "llama31_8b_to_4b_width", "--dry-run"])
    done = run("-c", code, host="")
    assert done.returncode == 0, done.stderr
    assert "nothing was loaded or written" in done.stdout
