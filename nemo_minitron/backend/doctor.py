"""What is installed, whether it fits together, and the command that mends what does not.

It reads the installed packages' metadata and looks for modules without importing them: it must answer where
importing NeMo fails. Transformer Engine alone is imported, in a process of its own and where there is a GPU: no file
tells whether it can be. Nothing is changed and no network is used.
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
from nemo_minitron.backend.versions import SUPPORTED, fits, installed
from nemo_minitron.precisions import FP8


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A distribution: the range that works, why, and whether the package runs without it."""

    name: str
    range: str
    why: str
    optional: bool = False


WANTED = (
    Wanted("torch", ">=2.6", "grouped-query attention and sharded checkpoints"),
    Wanted("nemo_toolkit", SUPPORTED["nemo_toolkit"], "3.x has no LLM collection any more"),
    Wanted("megatron-core", SUPPORTED["megatron-core"], "what NeMo 2.6 and 2.7 were written for"),
    Wanted("nemo_run", ">=0.4", "starts jobs, here and on clusters"),
    Wanted("lightning", ">=2.3", "NeMo's trainer"),
    Wanted("transformers", ">=4.51,<5", "NeMo 2 does not know 5.x"),
    Wanted("datasets", ">=3,<5", "reads text"),
    Wanted("numpy", "<2", "Megatron-core and NeMo pin it"),
    Wanted("pyarrow", "<22", "newer ones need numpy 2, and `import datasets` fails"),
    Wanted("leptonai", "<0.28", "newer ones lack leptonai.api.v1, which NeMo-Run imports"),
    Wanted("safetensors", ">=0.4.5", "Hugging Face folders"),
    Wanted("transformer-engine", ">=2.9,<2.13", "Megatron-core 0.15 asks for 2.9; fused layers and FP8", True),
    Wanted("apex", "", "NVIDIA's, from its containers; the package of that name on the index is another", True),
    Wanted("nvidia-modelopt", "<0.42", "newer ones assert on NeMo 2's wrapped models; a peer, not needed", True),
)
PYTHON = Wanted("python", ">=3.10,<3.13", "NeMo 2 has no releases for others")
CONTAINERS = (
    ("nvcr.io/nvidia/nemo", "NeMo", "Megatron-core", "Transformer Engine"),
    ("25.11 (nearest)", "2.6.0", "0.15.0", "2.9"),
    ("26.02 (last)", "2.7.0", "0.16.0", "2.12"),
)
BUILD_ON_GPU = "pip install --no-build-isolation 'transformer-engine[pytorch]>=2.9,<2.13'"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One distribution: `version` is None where it is missing; `mend` is a command, empty where all is well."""

    name: str
    version: str | None
    wanted: str
    ok: bool
    why: str
    mend: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """What `examine` saw; `ok` is False where something that is needed is missing or does not fit."""

    findings: tuple[Finding, ...]
    devices: tuple[str, ...]
    layers: str
    adam: str
    precisions: tuple[tuple[str, str], ...]  # of FP8: name -> how it runs, or why it cannot
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)

    def json(self) -> str:
        """Every field and `ok`, as a JSON object."""
        return json.dumps({"ok": self.ok, **dataclasses.asdict(self)}, indent=2)

    def text(self) -> str:
        """For people: a line for each distribution, what will be used, and what to run."""
        lines = [_line(finding) for finding in self.findings]
        lines += ["", f"devices: {', '.join(self.devices) or 'none with CUDA; the CPU and gloo are used'}"]
        lines += [f"layers:  {self.layers}", f"adam:    {self.adam}"]
        lines += [f"{name + ':':15}{how}" for name, how in self.precisions]
        lines += [f"note:    {note}" for note in self.notes]
        if mends := [finding.mend for finding in self.findings if finding.mend]:
            lines += ["", "to mend it, run:", *(f"  {mend}" for mend in mends)]
        if not self.ok:
            lines += ["", "or start from a container in which these fit:", *map(_row, CONTAINERS)]
        return "\n".join([*lines, "", "all is well" if self.ok else "some of it does not fit"])


def _line(finding: Finding) -> str:
    mark = "BAD" if not finding.ok else "ok " if finding.version else " - "
    version, wanted = finding.version or "missing", finding.wanted or "any"
    line = f"{mark} {finding.name:<20}{version:<16}{wanted:<16}{finding.why}"
    return line.rstrip()


def _row(cells: tuple[str, ...]) -> str:
    return "  " + "".join(f"{cell:<22}" for cell in cells).rstrip()


def examine() -> Report:
    """Looks at this environment. Imports none of torch, Megatron and NeMo."""
    findings = (_judge(PYTHON, platform.python_version()), *(_judge(w, installed(w.name)) for w in WANTED))
    found = {finding.name: finding.version for finding in findings}
    devices = cuda_devices()
    fine = {finding.name: finding.ok for finding in findings}
    engine = found["transformer-engine"] is not None and fine["transformer-engine"]
    return Report(
        findings=findings,
        devices=devices,
        layers=_layers(devices, engine, found["torch"] or ""),
        adam=_adam(engine, devices),
        precisions=tuple(_precisions(_layers(devices, engine, found["torch"] or ""), found)),
        notes=tuple(_notes(found, devices)),
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
        mend = "python3.11 -m venv .venv  # and install everything anew in it"
    return Finding(name, version, wanted.range, ok, wanted.why, mend)


def _engine(wanted: Wanted, version: str) -> Finding | None:
    """What is wrong with an installed Transformer Engine besides its version, which has a mend of its own."""
    if not compiled_engine():
        why = "its compiled part for PyTorch is missing; without it the reference layers run"
        return Finding(wanted.name, version, wanted.range, False, why, BUILD_ON_GPU)
    if fits(version, wanted.range) and cuda_devices() and (said := transformer_engine.refusal()):
        why = f"it does not import, and the reference layers run: {said}"
        return Finding(wanted.name, version, wanted.range, False, why)
    return None


def _apex(wanted: Wanted, version: str | None) -> Finding:
    """NVIDIA's is without fault; another package of that name hides it from Megatron."""
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
    """Megatron's own choice: Transformer Engine's, else apex's, else torch's, without a GPU always (`engine.hide`)."""
    if engine and devices:
        return "Transformer Engine's FusedAdam"
    return "apex's FusedAdam" if nvidia_apex() and devices else "torch's AdamW"


def _precisions(layers: str, found: dict[str, str | None]) -> Iterator[tuple[str, str]]:
    """What becomes of each FP8 precision here; fp32 and bf16 run everywhere."""
    capability = compute_capability() if layers == "Transformer Engine" else None
    for name in FP8:
        if layers != "Transformer Engine":
            yield name, "emulated in the reference layers"
        elif capability is None:
            yield name, "unknown: nvidia-smi does not say the device's compute capability"
        else:
            why = unsupported(name, capability, cuda_of(found["torch"] or ""), found["transformer-engine"] or "0")
            yield name, f"no: {why}" if why else "Transformer Engine"


def _notes(found: dict[str, str | None], devices: tuple[str, ...]) -> list[str]:
    notes = []
    megatron, torch = found["megatron-core"], found["torch"] or ""
    if megatron and fits(megatron, ">=0.16,<0.17"):
        notes.append(
            "NeMo 2.7.3 passes megatron-core an argument that 0.16 has removed (no_weight_decay_cond); "
            "where training fails on it, run: pip install 'megatron-core>=0.15,<0.16'"
        )
    for lock in transformer_engine.builds_left():
        notes.append(f"importing Megatron waits while {lock} is there; where nothing compiles any more, remove it")
    if devices and torch.endswith("+cpu"):
        notes.append(f"torch {torch} does not see the GPU; install torch's CUDA build")
    elif devices and found["transformer-engine"] is None:
        notes.append(f"fused layers and FP8 need Transformer Engine; run: {BUILD_ON_GPU}")
    return notes


# -- what the machine has ----------------------------------------------------------------------------------
def module_found(name: str) -> bool:
    """Whether a top-level module can be found; it is not imported."""
    return importlib.util.find_spec(name) is not None


def nvidia_apex() -> bool:
    """Whether the installed `apex` is NVIDIA's, which has optimizers; the index's has none."""
    spec = importlib.util.find_spec("apex")
    places = (spec.submodule_search_locations or []) if spec else []
    return any((Path(place) / "optimizers").is_dir() for place in places)


def cuda_devices(driver: Path = Path("/proc/driver/nvidia/gpus")) -> tuple[str, ...]:
    """Names of the NVIDIA devices that the driver shows, none where CUDA_VISIBLE_DEVICES hides them all."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ()
    names = []
    for file in sorted(driver.glob("*/information")):
        lines = file.read_text().splitlines()
        names += [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]
    return tuple(names or asked("name"))  # some sandboxes have the driver and not its folder


def compute_capability() -> tuple[int, int] | None:
    """The least of all devices, as the driver's tool says it; None where it does not."""
    told = re.findall(r"^(\d+)\.(\d+)$", "\n".join(asked("compute_cap")), re.MULTILINE)
    return min(((int(major), int(minor)) for major, minor in told), default=None)


def asked(what: str) -> list[str]:
    """What nvidia-smi says of each device; nothing where it is missing or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={what}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def compiled_engine() -> bool:
    """Whether Transformer Engine can be more than its Python."""
    return transformer_engine.compiled()


def cuda_of(torch: str) -> tuple[int, int]:
    """Of torch's local version, `2.9.0+cu129`; else as torch's own file says it (NVIDIA's builds name no CUDA in
    their version); else of the runtime's package; (0, 0) where none says it."""
    told = re.search(r"\+cu(\d+)(\d)$", torch) or re.search(r"^cuda\b[^=]*= *'(\d+)\.(\d+)", torch_file(), re.M)
    packages = (installed(f"nvidia-cuda-runtime{end}") for end in ("", "-cu13", "-cu12"))
    version = ".".join(told.groups()) if told else next(filter(None, packages), "0.0")
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def torch_file() -> str:
    """torch/version.py, where torch is; read, not imported."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else Path("version.py")
    return file.read_text() if spec and file.is_file() else ""
