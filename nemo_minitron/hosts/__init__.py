"""The frameworks that build and train models: what the package asks of one (`protocol`), and which one does it."""

from __future__ import annotations

from nemo_minitron.hosts.protocol import Host


def host_of() -> Host:
    """The host of this process. NeMo is the only one."""
    from nemo_minitron.hosts.nemo.host import NEMO

    return NEMO
