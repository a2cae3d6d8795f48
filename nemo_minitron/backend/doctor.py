"""What is installed, whether it fits together, and the command that mends what does not.

It reads the metadata of installed packages and looks for modules without importing them, because it must answer even if
NeMo cannot be imported. Only Transformer Engine is imported, in another process and if there is a GPU: no file tells
whether it can be imported. Nothing is changed and no network is used.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from nemo_minitron.backend import engine as transformer_engine
from nemo_minitron.backend.precision import unsupported
from nemo_minitron.backend.versions import SETS, TO_INSTALL, fits, installed
from nemo_minitron.backend.wanted import ENGINE, SET_OF, Wanted
from nemo_minitron.precisions import FP8

BUILD_ON_GPU = f"pip install --no-build-isolation 'transformer-engine[pytorch]{ENGINE}'"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One distribution. `version` is None if it is missing. `mend` is a command, empty if all is well."""

    name: str
    version: str | None
    wanted: str
    ok: bool
    why: str
    mend: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of `examine`. `ok` is False if something that is needed is missing or does not fit."""

    host: str
    because: str  # why it is this host
    findings: tuple[Finding, ...]
    devices: tuple[str, ...]
    layers: str
    adam: str
    precisions: tuple[tuple[str, str], ...]  # FP8 precision -> how it runs, or why it cannot
    notes: tuple[str, ...]
    containers: tuple[tuple[str, ...], ...]

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)

    def json(self) -> str:
        """Every field and `ok`, as a JSON object."""
        return json.dumps({"ok": self.ok, **dataclasses.asdict(self)}, indent=2)

    def text(self) -> str:
        """For people: a line for each distribution, what will be used, and what to run."""
        lines = [_line(finding) for finding in self.findings]
        lines += ["", f"host:    {self.host}, because {self.because}"]
        lines += [f"devices: {', '.join(self.devices) or 'none with CUDA; the CPU and gloo are used'}"]
        lines += [f"layers:  {self.layers}", f"adam:    {self.adam}"]
        lines += [f"{name + ':':15}{how}" for name, how in self.precisions]
        lines += [f"note:    {note}" for note in self.notes]
        if mends := [finding.mend for finding in self.findings if finding.mend]:
            lines += ["", "to mend it, run:", *(f"  {mend}" for mend in mends)]
        if not self.ok:
            lines += ["", "or start from a container in which these fit:", *map(_row, self.containers)]
        return "\n".join([*lines, "", "all is well" if self.ok else "some of it does not fit"])


def _line(finding: Finding) -> str:
    mark = "BAD" if not finding.ok else "ok " if finding.version else " - "
    version, wanted = finding.version or "missing", finding.wanted or "any"
    line = f"{mark} {finding.name:<20}{version:<16}{wanted:<16}{finding.why}"
    return line.rstrip()


def _row(cells: tuple[str, ...]) -> str:
    return "  " + "".join(f"{cell:<22}" for cell in cells).rstrip()


def examine(host: str, because: str) -> Report:
    """Examines this environment for a host, `nemo` or `bridge`. Imports neither torch nor Megatron nor NeMo."""
    here = SET_OF[host]
    packages = (_judge(wanted, installed(wanted.name)) for wanted in here.wanted)
    findings = (_judge(here.python, platform.python_version()), *packages)
    versions = {finding.name: finding.version for finding in findings}
    devices = cuda_devices()
    fine = {finding.name: finding.ok for finding in findings}
    engine = versions["transformer-engine"] is not None and fine["transformer-engine"]
    return Report(
        host=here.host,
        because=because,
        findings=findings,
        devices=devices,
        layers=_layers(devices, engine, versions["torch"] or ""),
        adam=_adam(engine, devices),
        precisions=tuple(_precisions(_layers(devices, engine, versions["torch"] or ""), versions)),
        notes=tuple(_notes(versions, devices)),
        containers=here.containers,
    )


def _judge(wanted: Wanted, version: str | None) -> Finding:
    name = wanted.name
    if name == "apex":
        return _apex(wanted, version)
    if name == "transformer-engine" and version is not None and (wrong := _engine(wanted, version)):
        return wrong
    if version is None:
        mend = "" if wanted.optional else f"pip install '{name}{wanted.range}'"
        return Finding(name, None, wanted.range, wanted.optional, wanted.why, mend)
    ok = fits(version, wanted.range)
    mend = "" if ok else f"pip install '{name}{wanted.range}'"
    if name == "python" and not ok:
        newest = "3.12" if fits("3.12", wanted.range) and not fits("3.11", wanted.range) else "3.11"
        mend = f"python{newest} -m venv .venv  # and install everything anew in it"
    return Finding(name, version, wanted.range, ok, wanted.why, mend)


def _engine(wanted: Wanted, version: str) -> Finding | None:
    """What is wrong with an installed Transformer Engine, apart from its version. None if nothing is."""
    if not compiled_engine():
        why = "its compiled part for PyTorch is missing; without it the reference layers run"
        return Finding(wanted.name, version, wanted.range, False, why, BUILD_ON_GPU)
    if fits(version, wanted.range) and cuda_devices() and (said := transformer_engine.refusal()):
        why = f"it does not import, and the reference layers run: {said}"
        return Finding(wanted.name, version, wanted.range, False, why)
    return None


def _apex(wanted: Wanted, version: str | None) -> Finding:
    """NVIDIA's apex is fine. Another package of that name would hide it from Megatron."""
    wrong = module_found("apex") and not nvidia_apex()
    mend = "pip uninstall apex" if wrong else ""
    return Finding("apex", version, wanted.range, not wrong, wanted.why, mend)


def _layers(devices: tuple[str, ...], engine: bool, torch: str) -> str:
    if not devices:
        return "reference (no CUDA device)"
    if torch.endswith("+cpu"):
        return "reference (torch is a CPU build)"
    return "Transformer Engine" if engine else "reference (no Transformer Engine that fits), on the GPU"


def _adam(engine: bool, devices: tuple[str, ...]) -> str:
    """Megatron's own choice: Transformer Engine's, or apex's, or torch's. Without a GPU it is torch's
    (`engine.hide`)."""
    if engine and devices:
        return "Transformer Engine's FusedAdam"
    return "apex's FusedAdam" if nvidia_apex() and devices else "torch's AdamW"


def _precisions(layers: str, versions: dict[str, str | None]) -> Iterator[tuple[str, str]]:
    """How each FP8 precision runs here. fp32 and bf16 run everywhere."""
    capability = compute_capability() if layers == "Transformer Engine" else None
    for name in FP8:
        if layers != "Transformer Engine":
            yield name, "emulated in the reference layers"
        elif capability is None:
            yield name, "unknown: nvidia-smi does not say the device's compute capability"
        else:
            why = unsupported(name, capability, cuda_of(versions["torch"] or ""), versions["transformer-engine"] or "0")
            yield name, f"no: {why}" if why else "Transformer Engine"


def _notes(versions: dict[str, str | None], devices: tuple[str, ...]) -> list[str]:
    notes = [] if any(map(installed, SETS)) else [f"no host is installed here; {TO_INSTALL}"]
    megatron, torch = versions["megatron-core"], versions["torch"] or ""
    if megatron and fits(megatron, ">=0.16,<0.17"):
        notes.append(
            "NeMo 2.7.3 passes megatron-core an argument that 0.16 has removed (no_weight_decay_cond); "
            "where training fails on it, run: pip install 'megatron-core>=0.15,<0.16'"
        )
    for lock in transformer_engine.builds_left():
        notes.append(f"importing Megatron waits while {lock} is there; where nothing compiles any more, remove it")
    if devices and torch.endswith("+cpu"):
        notes.append(f"torch {torch} does not see the GPU; install torch's CUDA build")
    elif devices and versions["transformer-engine"] is None:
        notes.append(f"fused layers and FP8 need Transformer Engine; run: {BUILD_ON_GPU}")
    return notes


# -- what the machine has ----------------------------------------------------------------------------------
def module_found(name: str) -> bool:
    """Whether a top-level module can be found. It is not imported."""
    return importlib.util.find_spec(name) is not None


def nvidia_apex() -> bool:
    """Whether the installed `apex` is NVIDIA's, which has optimizers. The one from the package index has none."""
    spec = importlib.util.find_spec("apex")
    places = (spec.submodule_search_locations or []) if spec else []
    return any((Path(place) / "optimizers").is_dir() for place in places)


def cuda_devices(driver: Path = Path("/proc/driver/nvidia/gpus")) -> tuple[str, ...]:
    """Names of the NVIDIA devices that the driver shows. None if CUDA_VISIBLE_DEVICES hides all of them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ()
    names = []
    for file in sorted(driver.glob("*/information")):
        lines = file.read_text().splitlines()
        names += [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]
    return tuple(names or nvidia_smi("name"))  # some sandboxes have the driver, but not its folder


def compute_capability() -> tuple[int, int] | None:
    """The least capability of all devices, from nvidia-smi. None if it does not say."""
    capabilities = re.findall(r"^(\d+)\.(\d+)$", "\n".join(nvidia_smi("compute_cap")), re.MULTILINE)
    return min(((int(major), int(minor)) for major, minor in capabilities), default=None)


def nvidia_smi(what: str) -> list[str]:
    """What nvidia-smi says about each device. Empty if it is missing or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={what}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def compiled_engine() -> bool:
    """Whether Transformer Engine has its compiled part."""
    return transformer_engine.compiled()


def cuda_of(torch: str) -> tuple[int, int]:
    """torch's CUDA version. It stands in its local version, `2.9.0+cu129`, or in torch's own file (the version of
    NVIDIA's
    builds names no CUDA). Otherwise it is that of the runtime's package. (0, 0) if none of them says it."""
    named = re.search(r"\+cu(\d+)(\d)$", torch) or re.search(r"^cuda\b[^=]*= *'(\d+)\.(\d+)", torch_file(), re.M)
    packages = (installed(f"nvidia-cuda-runtime{end}") for end in ("", "-cu13", "-cu12"))
    version = ".".join(named.groups()) if named else next(filter(None, packages), "0.0")
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def torch_file() -> str:
    """The text of torch/version.py, which is not imported. Empty without torch."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else Path("version.py")
    return file.read_text() if spec and file.is_file() else ""
