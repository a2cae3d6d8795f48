"""Packs the wheels that a GPU machine without a package index needs into one folder of pieces:

    python benchmarks/gpu_pack.py PACK -c constraints.txt --there 'torch,nvidia-cu*' REQUIREMENT...
    python PACK/install.py --venv VENV        # on the other machine; `gpu_unpack.py` is this script's source

It runs where there is an index, under the Python version and the system of the other machine. pip resolves the
requirements, the wheels are downloaded or built, and they are cut into pieces of at most `--piece` MiB. `--there` names
(with * for any letters) what that machine has: it counts when versions are chosen (pip may load it to read what it
needs), but it is not packed. A requirement may be the file of a wheel. A later `-c` does not overrule an earlier one:
for another torch than that of constraints.txt, give a copy without its lines for torch and triton.

An sdist that needs torch to be built (transformer_engine_torch, so the extra `transformer-engine[pytorch]`) must be no
requirement: pip builds it apart, with several GB of a torch of its own. Build its wheel where the other machine's torch
is installed (one without CUDA fails at once): `pip wheel --no-deps --no-build-isolation
transformer_engine_torch==2.9.0`, with CPATH on the include folders of pip's nvidia packages (crt and cccl, too), and
give the wheel's file. It is C++ alone, needs no GPU, and took 11 minutes on two cores. Of the kernels in
libtransformer_engine.so a Hopper needs only those of sm_90; they are packed as they are.

Tried, beside the tiny wheels of tests/test_gpu_pack.py: Python 3.12, constraints.txt with torch 2.11, `--there
'torch,triton,nvidia-cu*,nvidia-n[cv]*,cuda-*'`, and as requirements nemo_toolkit[llm,run], megatron-core,
transformers<5, transformer-engine[core_cu13]==2.9.0 and onnxscript: 261 wheels, 656 MiB in 11 pieces, after five
minutes on two cores beside other work, with pip's cache of what it had loaded before. Not tried with this script: the
wheel of transformer_engine_torch, and a machine with a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from gpu_unpack import Refusal, is_there, refusing

MIB = 1 << 20


class Pieces(io.RawIOBase):
    """A stream that is written into files of at most `size` bytes; `rows` has the name and digest of each."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.rows: list[dict[str, Any]] = []
        self.content = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.content += data
        while len(self.content) >= self.size:
            self.cut()
        return len(data)

    def cut(self) -> None:
        piece, self.content = bytes(self.content[: self.size]), self.content[self.size :]
        name = f"piece.{len(self.rows):03d}"
        (self.folder / name).write_bytes(piece)
        self.rows.append({"name": name, "bytes": len(piece), "sha256": hashlib.sha256(piece).hexdigest()})

    def close(self) -> None:
        if self.content:
            self.cut()
        super().close()


def pip(*words: str) -> None:
    """Runs pip; raises Refusal if it fails."""
    if subprocess.run([sys.executable, "-m", "pip", *words], stdout=sys.stderr).returncode:
        raise Refusal(f"pip {words[0]} failed; what it said stands above")


def resolved(requirements: list[str], constraints: list[str], work: Path) -> list[dict[str, str]]:
    """Name and version of all that must be installed, and what pip is told to get; nothing is installed."""
    report = work / "report.json"
    words = [word for file in constraints for word in ("-c", file)]
    pip("install", "--dry-run", "--ignore-installed", "--report", str(report), *words, *requirements)
    rows = []
    for item in json.loads(report.read_text())["install"]:
        name, version, url = item["metadata"]["name"], item["metadata"]["version"], item["download_info"]["url"]
        rows.append({"name": name, "version": version, "get": url if url.startswith("file:") else f"{name}=={version}"})
    return sorted(rows, key=lambda row: row["name"].lower())


def pack(folder: Path, requirements: list[str], constraints: list[str], there: list[str], size: int) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise Refusal(f"{folder} is not empty; give a folder that does not exist")
    with tempfile.TemporaryDirectory() as work:
        every = resolved(requirements, constraints, Path(work))
        rows = [row for row in every if not is_there(row["name"], there)]
        if not rows:
            raise Refusal("--there names all that the requirements need, so there is nothing to pack")
        wheels = Path(work) / "wheels"
        pip("wheel", "--no-deps", "--wheel-dir", str(wheels), *(row["get"] for row in rows))
        folder.mkdir(parents=True, exist_ok=True)
        with Pieces(folder, size) as pieces, tarfile.open(fileobj=pieces, mode="w|") as tar:
            for wheel in sorted(wheels.iterdir()):
                tar.add(wheel, wheel.name)
    left_out = {row["name"]: row["version"] for row in every if is_there(row["name"], there)}
    index = {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}", "there": there, "left out": left_out,
        "packages": {row["name"]: row["version"] for row in rows}, "pieces": pieces.rows,
    }  # fmt: skip
    (folder / "pack.json").write_text(json.dumps(index, indent=1) + "\n")
    shutil.copy(Path(__file__).with_name("gpu_unpack.py"), folder / "install.py")
    count = sum(row["bytes"] for row in pieces.rows)
    print(
        f"{folder}: {len(rows)} wheels, {count / MIB:,.1f} MiB in {len(pieces.rows)} pieces; left out: {len(left_out)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path, help="the folder to write")
    parser.add_argument("requirement", nargs="+", help="as for pip, for example 'nemo_toolkit[llm,run]'")
    parser.add_argument("-c", "--constraint", action="append", default=[], metavar="FILE", help="as for pip")
    parser.add_argument("--there", default="", metavar="NAME,...", help="what the other machine has")
    parser.add_argument("--piece", type=float, default=60, metavar="MIB", help="the largest piece; default: 60")
    given = parser.parse_args()
    there = [name for name in given.there.split(",") if name]
    with refusing():
        pack(given.pack, given.requirement, given.constraint, there, round(given.piece * MIB))


if __name__ == "__main__":
    main()
