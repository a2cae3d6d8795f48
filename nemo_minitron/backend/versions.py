"""The versions that the replacements in this package were written for."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from nemo_minitron.errors import InputError

MEGATRON = ">=0.15,<0.20"
TO_INSTALL = (
    "install NeMo 2 with: pip install 'nemo_minitron[nemo]', or, on Python 3.12, Megatron-Bridge with: "
    "pip install 'nemo_minitron[bridge]' (without CUDA: make venv-bridge)"
)
# The frameworks that build and train models, each with the Megatron-core that it was written for.
SETS = {
    "nemo_toolkit": {"nemo_toolkit": ">=2.6,<3", "megatron-core": ">=0.15,<0.17"},
    "megatron-bridge": {"megatron-bridge": ">=0.6,<0.7", "megatron-core": ">=0.17,<0.20"},
}


def installed(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def fits(version: str, wanted: str) -> bool:
    """Whether a version is in a range such as '>=0.15,<0.17'. Pre-releases and local builds count, too."""
    return SpecifierSet(wanted).contains(Version(version), prereleases=True)


def check() -> None:
    """Raises InputError if Megatron-core is missing or of an unsupported version, and if a framework that is installed
    does not fit it."""
    megatron = installed("megatron-core")
    if megatron is None:
        raise InputError(f"megatron-core is not installed here; it comes with a host: {TO_INSTALL}")
    if not fits(megatron, MEGATRON):
        raise InputError(f"megatron-core {megatron} is installed; {MEGATRON} is supported: minitron doctor tells more")
    for framework, ranges in SETS.items():
        for name, wanted in ranges.items() if installed(framework) else ():
            version = installed(name)
            if version is not None and not fits(version, wanted):
                beside = "" if name == framework else f" beside {framework}"
                raise InputError(
                    f"{name} {version} is installed{beside}; {wanted} is supported: pip install '{name}{wanted}'"
                )


def replace(owner: Any, name: str, value: Any) -> None:
    """Sets an attribute that must exist. Raises InputError if this version of the owner lacks it."""
    if not hasattr(owner, name):
        where = getattr(owner, "__name__", type(owner).__name__)
        raise InputError(f"{where} has no '{name}': this version is not supported; run: minitron doctor")
    setattr(owner, name, value)
