"""Which of this package's requirements a container lacks, so that pip adds those and changes nothing else.

    python docker/lacking.py --save held.txt      # prints what is lacking; writes what is there, as pip constraints
    python docker/lacking.py --compare held.txt   # fails where a distribution has another version by now, or is gone

Exit code 1 where the container has no torch, no NeMo or no Megatron at all: those are not for pip to add.
"""

from __future__ import annotations

import argparse
import sys
from importlib import metadata
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
NEVER_ADDED = {"torch", "nemo-toolkit", "megatron-core"}


def versions() -> dict[str, str]:
    """Canonical name -> version of every installed distribution; of doubles the one that is imported."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        if name := distribution.metadata["Name"]:
            found.setdefault(canonicalize_name(name), distribution.version)
    return found


def lacking(project: Path, installed: dict[str, str]) -> list[str]:
    """The requirements of which no version is installed, as pip reads them."""
    wanted = tomllib.loads(project.read_text())["project"]["dependencies"]
    return [text for text in wanted if canonicalize_name(Requirement(text).name) not in installed]


def differences(held: str, installed: dict[str, str]) -> list[str]:
    """What has another version than `held` says, or is gone, in words."""
    pairs = (line.split("==", 1) for line in held.splitlines())
    return [
        f"{name} was {version} and is {installed.get(name, 'gone')}"
        for name, version in pairs
        if installed.get(name) != version
    ]


def main(arguments: list[str]) -> str | None:
    """Prints what is lacking; returns the sentence with which it fails, or None."""
    parser = argparse.ArgumentParser(description="What this container lacks.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--save", type=Path)
    what.add_argument("--compare", type=Path)
    options = parser.parse_args(arguments)
    installed = versions()
    if options.compare:
        changed = differences(options.compare.read_text(), installed)
        return f"pip has changed the container: {'; '.join(changed)}" if changed else None
    wanted = lacking(PROJECT, installed)
    if never := sorted(NEVER_ADDED & {canonicalize_name(Requirement(text).name) for text in wanted}):
        return f"this container has no {', '.join(never)}; take one of NVIDIA's NeMo containers as BASE"
    options.save.write_text("".join(f"{name}=={version}\n" for name, version in sorted(installed.items())))
    print("\n".join(wanted), end="\n" if wanted else "")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
