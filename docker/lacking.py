"""Lists the requirements of this package that a container lacks, so that pip adds those and changes nothing else.

    python docker/lacking.py nemo --save held.txt      # prints what the host, nemo or bridge, lacks here; writes the
                                                       # installed versions as pip constraints
    python docker/lacking.py nemo --compare held.txt   # fails if a distribution now has another version, or is gone

The exit code is 1 if the container lacks torch, Megatron or the host itself: pip must not add those.
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
NEVER_ADDED = {  # by host
    "nemo": {"torch", "megatron-core", "nemo-toolkit"},
    "bridge": {"torch", "megatron-core", "megatron-bridge"},
}


def versions() -> dict[str, str]:
    """Canonical name -> version of every installed distribution; of two with one name, the one that Python imports."""
    installed: dict[str, str] = {}
    for distribution in metadata.distributions():
        if name := distribution.metadata["Name"]:
            installed.setdefault(canonicalize_name(name), distribution.version)
    return installed


def lacking(project: Path, host: str, installed: dict[str, str]) -> list[str]:
    """The requirements of the package and of a host without an installed version, in the form that pip reads. A
    distribution that both name is listed with the host's range."""
    table = tomllib.loads(project.read_text())["project"]
    wanted = {
        canonicalize_name(Requirement(text).name): text
        for text in [*table["dependencies"], *table["optional-dependencies"][host]]
    }
    return [text for name, text in wanted.items() if name not in installed]


def differences(held: str, installed: dict[str, str]) -> list[str]:
    """One phrase for each distribution that has another version than in `held`, or is gone."""
    pairs = (line.split("==", 1) for line in held.splitlines())
    return [
        f"{name} was {version} and is {installed.get(name, 'gone')}"
        for name, version in pairs
        if installed.get(name) != version
    ]


def main(arguments: list[str]) -> str | None:
    """Prints the missing requirements; returns the sentence of a failure, or None."""
    parser = argparse.ArgumentParser(description="What this container lacks.")
    parser.add_argument("host", choices=sorted(NEVER_ADDED))
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--save", type=Path)
    what.add_argument("--compare", type=Path)
    options = parser.parse_args(arguments)
    installed = versions()
    if options.compare:
        changed = differences(options.compare.read_text(), installed)
        return f"pip has changed the container: {'; '.join(changed)}" if changed else None
    wanted = lacking(PROJECT, options.host, installed)
    if never := sorted(NEVER_ADDED[options.host] & {canonicalize_name(Requirement(text).name) for text in wanted}):
        return f"this container has no {', '.join(never)}; take one of NVIDIA's NeMo containers as BASE"
    options.save.write_text("".join(f"{name}=={version}\n" for name, version in sorted(installed.items())))
    print("\n".join(wanted), end="\n" if wanted else "")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
