"""doctor: what is installed, what fits, and what to run; over made-up tables of installed versions."""

import json
import subprocess
import sys

import pytest

from nemo_minitron.backend import doctor, engine

GOOD = {
    "torch": "2.9.0",
    "nemo_toolkit": "2.6.0",
    "megatron-core": "0.15.0",
    "nemo_run": "0.6.0",
    "lightning": "2.4.0",
    "transformers": "4.57.6",
    "datasets": "4.8.5",
    "numpy": "1.26.4",
    "pyarrow": "21.0.0",
    "leptonai": "0.27.3",
    "safetensors": "0.8.0",
    "transformer-engine": "2.9.0",
    "nvidia-modelopt": "0.37.0",
}


@pytest.fixture
def machine(monkeypatch):
    """A function that examines a made-up machine."""

    def examine(
        changes=None, devices=("NVIDIA H100",), apex=None, capability=(9, 0), compiled=True, torch_file="cuda = None",
        refusal="", locks=(), host="nemo",
    ):  # fmt: skip
        table = {**GOOD, **(changes or {})}
        monkeypatch.setattr(doctor, "installed", lambda name: table.get(name))
        monkeypatch.setattr(doctor, "cuda_devices", lambda: devices)
        monkeypatch.setattr(doctor, "compute_capability", lambda: capability)
        monkeypatch.setattr(doctor, "nvidia_apex", lambda: apex == "nvidia")
        monkeypatch.setattr(doctor, "compiled_engine", lambda: compiled)
        monkeypatch.setattr(doctor, "torch_file", lambda: torch_file)
        monkeypatch.setattr(doctor.transformer_engine, "refusal", lambda: refusal)
        monkeypatch.setattr(doctor.transformer_engine, "builds_left", lambda: list(locks))
        monkeypatch.setattr(doctor, "module_found", lambda name: apex is not None)
        monkeypatch.setattr(doctor.platform, "python_version", lambda: table.get("python", "3.11.7"))
        return doctor.examine(host, "it is the one that is installed")

    return examine


def bad(report):
    return {finding.name: finding.mend for finding in report.findings if not finding.ok}


def test_a_good_machine(machine):
    report = machine()
    assert report.ok
    assert bad(report) == {}
    assert report.layers == "Transformer Engine"
    assert report.adam == "Transformer Engine's FusedAdam"
    assert "all is well" in report.text()
    assert "25.11" not in report.text()


BRIDGE = {
    "python": "3.12.1", "nemo_toolkit": None, "megatron-bridge": "0.6.2", "megatron-core": "0.19.2", "numpy": "2.3.5",
    "transformers": "5.12.1", "datasets": "5.2.0", "pyarrow": "26.0.1", "leptonai": None, "nemo_run": None,
    "lightning": None, "transformer-engine": None, "nvidia-modelopt": "0.47.0",
}  # fmt: skip


def test_the_set_of_the_host(machine):
    because = "because it is the one that is installed"
    assert f"host:    NeMo 2, {because}" in machine().text().splitlines()
    report = machine(BRIDGE, devices=(), host="bridge")
    assert report.ok
    assert f"host:    Megatron-Bridge, {because}" in report.text().splitlines()
    assert json.loads(report.json())["because"] == report.because
    old = BRIDGE | {"python": "3.11.7", "megatron-core": "0.16.1"}
    assert bad(machine(old, devices=(), host="bridge")) == {
        "python": "python3.12 -m venv .venv  # and install everything anew in it",
        "megatron-core": "pip install 'megatron-core>=0.17,<0.20'",
    }
    none = machine({"nemo_toolkit": None})
    assert any("nemo_minitron[nemo]" in note and "nemo_minitron[bridge]" in note for note in none.notes)
    assert not any("no host" in note for note in [*report.notes, *machine().notes])
    assert "26.06" in machine(BRIDGE | {"transformers": "4.57.6"}, host="bridge").text()


@pytest.mark.parametrize(
    ("name", "version", "mend"),
    [
        ("pyarrow", "22.0.0", "pip install 'pyarrow<22'"),
        ("leptonai", "0.28.1", "pip install 'leptonai<0.28'"),
        ("numpy", "2.1.0", "pip install 'numpy<2'"),
        ("nemo_toolkit", "3.0.0", "pip install 'nemo_toolkit>=2.6,<3'"),
        ("nemo_toolkit", None, "pip install 'nemo_toolkit>=2.6,<3'"),
        ("megatron-core", "0.17.0", "pip install 'megatron-core>=0.15,<0.17'"),
        ("nvidia-modelopt", "0.46.0", "pip install 'nvidia-modelopt<0.42'"),
        ("transformers", "5.0.0", "pip install 'transformers>=4.51,<5'"),
    ],
)
def test_each_thing_that_does_not_fit_has_its_command(machine, name, version, mend):
    report = machine({name: version})
    assert bad(report) == {name: mend}
    assert not report.ok
    assert mend in report.text()
    assert "25.11" in report.text()  # the container in which all fit


def test_an_engine_without_its_compiled_part(machine):
    report = machine(compiled=False)
    assert bad(report) == {"transformer-engine": doctor.BUILD_ON_GPU}
    assert report.layers.startswith("reference")
    assert report.adam == "torch's AdamW"


def test_an_engine_that_does_not_import(machine):
    report = machine(refusal="VersionError: gencode 6.31.1 runtime 5.29.6")
    assert bad(report) == {"transformer-engine": ""}
    assert "VersionError: gencode 6.31.1" in report.text()
    assert report.layers.startswith("reference")
    assert machine({"transformer-engine": None}, refusal="ModuleNotFoundError").ok
    old = bad(machine({"transformer-engine": "1.13"}, refusal="ImportError"))  # why is clear, and so is the mend
    assert old == {"transformer-engine": "pip install 'transformer-engine>=2.9,<2.13'"}


def test_what_an_engine_says_that_does_not_import(tmp_path, monkeypatch):
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert engine.refusal() == "OSError: libcuda.so.1: cannot open shared object file"
    (package / "__init__.py").write_text("")
    (package / "pytorch.py").write_text("")
    assert engine.refusal() == ""


def test_a_build_that_megatrons_import_waits_for(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert engine.builds_left() == []
    lock = tmp_path / "managed_alloc_runtime" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert engine.builds_left() == [lock]
    report = machine(locks=[lock])
    assert report.ok
    assert f"while {lock} is there" in report.text()


def test_where_the_compiled_part_is_looked_for(tmp_path, monkeypatch):
    """Beside the package (built from source, NVIDIA's containers), in it, or in `wheel_lib` (from the index)."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('is only looked for')")
    monkeypatch.syspath_prepend(tmp_path)
    assert not engine.compiled()
    for folder in (tmp_path, package, package / "wheel_lib"):
        folder.mkdir(exist_ok=True)
        library = folder / "transformer_engine_torch.cpython-312-x86_64-linux-gnu.so"
        library.touch()
        assert engine.compiled()
        library.unlink()


def test_what_is_optional_may_be_missing(machine):
    report = machine({"transformer-engine": None, "nvidia-modelopt": None})
    assert report.ok
    assert report.layers.startswith("reference")
    assert any("transformer-engine" in note for note in report.notes)


def test_the_index_apex_is_not_nvidias(machine):
    assert bad(machine(apex="index")) == {"apex": "pip uninstall apex"}
    assert machine(apex="nvidia").ok


def test_which_adam(machine):
    without = {"transformer-engine": None}
    assert machine(without, apex="nvidia").adam == "apex's FusedAdam"
    assert machine(without).adam == "torch's AdamW"
    assert machine(apex="nvidia", devices=()).adam == "torch's AdamW"  # setup() keeps both from Megatron there


def test_which_precisions(machine):
    new = {"torch": "2.9.0+cu130"}
    assert set(dict(machine(new).precisions).values()) == {"Transformer Engine"}
    assert dict(machine(new, capability=(8, 0)).precisions)["fp8-current"] == (
        "no: FP8 needs compute capability 8.9, the device has 8.0"
    )
    old = dict(machine({"torch": "2.9.0+cu128"}).precisions)
    assert old["fp8-blockwise"] == "no: blocks need CUDA 12.9, torch was built with 12.8"
    assert old["fp8-delayed"] == old["fp8-current"] == "Transformer Engine"
    assert dict(machine({"nvidia-cuda-runtime-cu12": "12.9.79"}).precisions)["fp8-blockwise"] == "Transformer Engine"
    nvidias = {"torch": "2.9.0a0+145a3a7bda.nv25.10"}  # its own build's version names no CUDA
    assert "torch was built with 0.0" in dict(machine(nvidias).precisions)["fp8-blockwise"]
    told = "__version__ = '2.9.0a0+145a3a7bda.nv25.10'\ndebug = False\ncuda: Optional[str] = '13.0'\n"
    assert dict(machine(nvidias, torch_file=told).precisions)["fp8-blockwise"] == "Transformer Engine"
    assert "blocks need compute" in dict(machine(new, capability=(12, 0)).precisions)["fp8-blockwise"]
    assert set(dict(machine(devices=()).precisions).values()) == {"emulated in the reference layers"}
    assert "unknown" in dict(machine(new, capability=None).precisions)["fp8-current"]
    assert "fp8-blockwise: emulated in the reference layers" in machine(devices=()).text()


def test_the_adam_is_megatrons_choice():
    """On this machine, by Megatron's own word."""
    from megatron.core.optimizer import Adam

    library = doctor.examine("nemo", "").adam.split("'")[0]
    assert {"torch": "torch", "apex": "apex", "Transformer Engine": "transformer_engine"}[library] == (
        Adam.__module__.split(".")[0]
    )


def test_a_cpu_machine(machine):
    report = machine({"torch": "2.13.0+cpu"}, devices=())
    assert report.ok
    assert report.layers == "reference (no CUDA device)"
    blind = machine({"torch": "2.13.0+cpu"})
    assert blind.layers == "reference (torch is a CPU build)"
    assert any("CUDA build" in note for note in blind.notes)


def test_python_that_is_too_new(machine):
    assert "python" in bad(machine({"python": "3.13.1"}))


def test_megatron_016_is_noted(machine):
    report = machine({"megatron-core": "0.16.1"})
    assert report.ok
    assert any("no_weight_decay_cond" in note for note in report.notes)


def test_json(machine):
    told = json.loads(machine({"pyarrow": "22.0.0"}).json())
    assert told["ok"] is False
    assert {"findings", "devices", "layers", "adam", "precisions", "notes"} <= told.keys()
    assert [f["mend"] for f in told["findings"] if f["name"] == "pyarrow"] == ["pip install 'pyarrow<22'"]


def test_devices_are_read_from_the_driver(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H100 80GB\nIRQ: 1\n")
    assert doctor.cuda_devices(tmp_path) == ("NVIDIA H100 80GB",)
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'NVIDIA H200\\nNVIDIA H200\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert doctor.cuda_devices(tmp_path / "none") == ("NVIDIA H200",) * 2  # a sandbox without the driver's folder
    tool.write_text("#!/bin/sh\necho 'no devices were found'\nexit 6\n")
    assert doctor.cuda_devices(tmp_path / "none") == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor.cuda_devices(tmp_path) == ()


def test_it_imports_nothing_heavy():
    code = (
        "import sys; from nemo_minitron.backend.doctor import examine; examine('nemo', '').text(); "
        "assert not {'torch', 'megatron', 'nemo'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
