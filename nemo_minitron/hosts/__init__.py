"""The frameworks that build and train models. `protocol` says what the package asks of one.

A worker imports this file before it takes signals: torchrun's SIGTERM would be lost until then. So it imports nothing
that takes time.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nemo_minitron.settings.host import HOST

if TYPE_CHECKING:
    from pathlib import Path

    from nemo_minitron.artifacts.json_types import HfConfig
    from nemo_minitron.hosts.protocol import Host

PACKAGES = {"nemo": "nemo_toolkit", "bridge": "megatron-bridge"}  # host -> its distribution; the first one is preferred


def host_of() -> Host:
    """The host that MINITRON_HOST names. Without that, the one that is installed; NeMo if both are.

    Raises InputError for another name, for a host that is named and not installed, and if none is installed.
    """
    if host_name() == "bridge":
        from nemo_minitron.hosts.bridge.host import BRIDGE

        return BRIDGE
    from nemo_minitron.hosts.nemo.host import NEMO

    return NEMO


def check_model(model: str | Path | HfConfig, stage: str) -> None:
    """Raises InputError, before anything is loaded, if the host is not installed or cannot build the model, or if the
    model does not have this stage."""
    host_name()
    check_represented(model, stage)


def check_represented(model: str | Path | HfConfig, stage: str) -> None:
    """Raises InputError if the host, which may not be installed, cannot build the model, or it lacks this stage."""
    from nemo_minitron.families import check_host, check_stage

    check_stage(model, stage)
    check_host(model, chosen()[0])


def host_name() -> str:
    """The name of the host, as `host_of` chooses it. Raises what `host_of` raises."""
    from nemo_minitron.backend.versions import TO_INSTALL, installed
    from nemo_minitron.errors import InputError

    name, _ = chosen()
    if not installed(PACKAGES[name]):
        here = f"the host '{name}' is not installed here" if os.environ.get(HOST) else "no host is installed here"
        raise InputError(f"{here}; {TO_INSTALL}")
    return name


def chosen() -> tuple[str, str]:
    """The name of the host, which may not be installed, and why it is this one. Raises InputError for another name."""
    from nemo_minitron.backend.versions import installed
    from nemo_minitron.errors import InputError

    named = os.environ.get(HOST, "")
    if named and named not in PACKAGES:
        raise InputError(f"the host '{named}' is unknown; legal is {' or '.join(PACKAGES)}")
    if named:
        return named, f"--host or {HOST} names it"
    here = [host for host, package in PACKAGES.items() if installed(package)]
    if not here:
        return next(iter(PACKAGES)), "no host is installed"
    return here[0], "it is the one that is installed" if len(here) == 1 else "both are installed, and nothing names one"
