"""The frameworks that build and train models. `protocol` says what the package asks of one."""

from __future__ import annotations

import os
from importlib import metadata
from typing import TYPE_CHECKING

from nemo_minitron.errors import InputError

if TYPE_CHECKING:  # saving a checkpoint starts a helper process that imports this package: it must stay light
    from nemo_minitron.hosts.protocol import Host

HOST = "MINITRON_HOST"  # names the host of this process and of those that it starts
PACKAGES = {"nemo": "nemo_toolkit", "bridge": "megatron-bridge"}  # host -> its distribution; the first one is preferred


def host_of() -> Host:
    """The host that MINITRON_HOST names. Without that, the one that is installed; NeMo if both are or none is.

    Raises InputError for another name, and for a host that is named and not installed.
    """
    if host_name() == "bridge":
        from nemo_minitron.hosts.bridge.host import BRIDGE

        return BRIDGE
    from nemo_minitron.hosts.nemo.host import NEMO

    return NEMO


def host_name() -> str:
    """The name of the host, as `host_of` chooses it. Raises what `host_of` raises."""
    named = os.environ.get(HOST, "")
    if not named:
        return next(filter(_installed, PACKAGES), "nemo")
    if named not in PACKAGES:
        raise InputError(f"the host '{named}' is unknown; legal is {' or '.join(PACKAGES)}")
    if not _installed(named):
        raise InputError(f"the host '{named}' is not installed here; run: pip install {PACKAGES[named]}")
    return named


def _installed(host: str) -> bool:
    try:
        metadata.version(PACKAGES[host])
    except metadata.PackageNotFoundError:
        return False
    return True
