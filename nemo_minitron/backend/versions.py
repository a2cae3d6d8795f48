"""The versions that the replacements in this package were written for."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from nemo_minitron.errors import InputError

SUPPORTED = {"megatron-core": ">=0.15,<0.17", "nemo_toolkit": ">=2.6,<3"}


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
    """Raises InputError if Megatron-core is missing, and if it or NeMo is not a supported version."""
    for name, wanted in SUPPORTED.items():
        version = installed(name)
        if version is None and name == "megatron-core":
            raise InputError(f"megatron-core is not installed; run: pip install 'megatron-core{wanted}'")
        if version is not None and not fits(version, wanted):
            raise InputError(f"{name} {version} is installed; {wanted} is supported: pip install '{name}{wanted}'")


def replace(owner: Any, name: str, value: Any) -> None:
    """Sets an attribute that must exist. Raises InputError if this version of the owner lacks it."""
    if not hasattr(owner, name):
        where = getattr(owner, "__name__", type(owner).__name__)
        raise InputError(f"{where} has no '{name}': this version is not supported; run: minitron doctor")
    setattr(owner, name, value)
