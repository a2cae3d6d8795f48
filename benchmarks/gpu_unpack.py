"""Installs a pack of `gpu_pack.py` on a machine without a package index; there its name is `install.py`:

    python PACK/install.py --venv VENV          # a new environment
    python PACK/install.py --target FOLDER      # or a folder, for PYTHONPATH

It checks the SHA-256 of each piece, joins them, and installs the wheels with this Python's pip, without index. The
venv sees what `--there` named when it was packed, and nothing else of this machine: each such package is linked. A
piece that is missing or damaged ends it with one sentence and exit code 2, and nothing is installed. It needs Python
and pip alone, and as much room again as the pack has.

If a call is killed while torch compiles an extension, give the next one a new TORCH_EXTENSIONS_DIR, or it waits for a
lock that nobody holds.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Refusal(Exception):
    """One sentence for the user."""


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """A refusal ends the script with its sentence and exit code 2."""
    try:
        yield
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        raise SystemExit(2) from None


def plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def is_there(name: str, there: list[str]) -> bool:
    """Whether a distribution is one of those that the other machine has."""
    return any(fnmatch.fnmatchcase(plain(name), plain(pattern)) for pattern in there)


def checked(folder: Path) -> dict[str, Any]:
    """The index of a pack whose pieces are all there and whole, and that fits this Python."""
    if not (folder / "pack.json").exists():
        raise Refusal(f"{folder} has no pack.json, so it is no pack")
    index: dict[str, Any] = json.loads((folder / "pack.json").read_text())
    for row in index["pieces"]:
        piece, again = folder / row["name"], "copy it again from the machine that packed"
        if not piece.exists():
            raise Refusal(f"{row['name']} is missing; {again}")
        if hashlib.sha256(piece.read_bytes()).hexdigest() != row["sha256"]:
            raise Refusal(f"{row['name']} is damaged: its SHA-256 is not that of the pack; {again}")
    own, wanted = f"{sys.version_info.major}.{sys.version_info.minor}", index["python"]
    if own != wanted:
        raise Refusal(f"the pack is for Python {wanted}, and this is {own}; run it with python{wanted}")
    check_there(index)
    return index


def check_there(index: dict[str, Any]) -> None:
    """Raises Refusal if a package is missing that `--there` names in full; what its patterns match may be missing (a
    torch can bring CUDA's libraries itself). That, and another version than the pack was made with, is printed."""
    here = {plain(found.metadata["Name"]): found.version for found in importlib.metadata.distributions()}
    named = {plain(name) for name in index["there"]}
    lacking = [name for name in index["left out"] if plain(name) not in here]
    if needed := [name for name in lacking if plain(name) in named]:
        raise Refusal(f"neither the pack nor this Python has {', '.join(needed)}; pack again with another --there")
    if lacking:
        print(f"not here, and not in the pack: {', '.join(lacking)}")
    for name, version in index["left out"].items():
        if (own := here.get(plain(name), version)).partition("+")[0] != version.partition("+")[0]:
            print(f"{name} {own} is here; the pack was made for {version}")


class Joined(io.RawIOBase):
    """The pieces as one stream to read."""

    def __init__(self, files: list[Path]) -> None:
        self.files, self.content = list(files), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.content and self.files:
            self.content = memoryview(self.files.pop(0).read_bytes())
        taken, self.content = self.content[: len(buffer)], self.content[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)


def see(there: list[str], site: Path) -> list[str]:
    """Links what this Python has of `there` into a venv's site-packages; returns the names."""
    seen = [found for found in importlib.metadata.distributions() if is_there(found.metadata["Name"], there)]
    for found in seen:
        for parts in {top_of(file.parts, found) for file in found.files or () if file.parts[0] != ".."}:
            link = site.joinpath(*parts)
            link.parent.mkdir(exist_ok=True)
            if not link.exists():
                link.symlink_to(Path(str(found.locate_file("/".join(parts)))).resolve())
    return [found.metadata["Name"] for found in seen]


def top_of(parts: tuple[str, ...], found: importlib.metadata.Distribution) -> tuple[str, ...]:
    """What is linked for a file: its package's folder, or in a folder that packages share (nvidia) the one below."""
    folder = Path(str(found.locate_file(parts[0])))
    shared = folder.is_dir() and folder.suffix != ".dist-info" and not (folder / "__init__.py").exists()
    return parts[:2] if shared else parts[:1]


def install(folder: Path, venv: Path | None, target: Path | None) -> None:
    index, pip = checked(folder), [sys.executable, "-m", "pip"]
    with tempfile.TemporaryDirectory(dir=folder) as work:
        stream = io.BufferedReader(Joined([folder / row["name"] for row in index["pieces"]]), 1 << 20)
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            tar.extractall(work, filter="data")
        place = ["--target", str(target)] if target else []
        if venv:
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
            names = see(index["there"], next(venv.glob("lib/python*/site-packages")))
            print(f"seen from this machine: {', '.join(names) or 'nothing'}")
            pip += ["--python", str(venv / "bin" / "python")]
        words = ["install", "--quiet", "--no-index", "--no-deps", *place, *map(str, Path(work).iterdir())]
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # pip takes it for installed
        if subprocess.run([*pip, *words], stdout=sys.stderr, env=own).returncode:
            raise Refusal("pip failed; what it said stands above")
    print(f"{venv or target}: {len(index['packages'])} packages installed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--venv", type=Path, help="the environment to make")
    place.add_argument("--target", type=Path, help="or the folder to install into")
    parser.add_argument(
        "--pack", type=Path, default=Path(__file__).resolve().parent, help="default: this file's folder"
    )
    given = parser.parse_args()
    with refusing():
        if given.venv and given.venv.exists():
            raise Refusal(f"{given.venv} exists; name a folder that does not")
        install(given.pack, given.venv, given.target)


if __name__ == "__main__":
    main()
