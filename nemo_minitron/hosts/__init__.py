"""The frameworks that build and train models: what the package asks of one (`protocol`), and which one does it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a worker's helper imports this package, and nothing heavy with it
    from nemo_minitron.hosts.protocol import Host


def host_of() -> Host:
    """The host of this process. NeMo is the only one."""
    from nemo_minitron.hosts.nemo.host import NEMO

    return NEMO
