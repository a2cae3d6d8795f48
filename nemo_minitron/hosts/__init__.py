"""The frameworks that build and train models. `protocol` says what the package asks of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # saving a checkpoint starts a helper process that imports this package: it must stay light
    from nemo_minitron.hosts.protocol import Host


def host_of() -> Host:
    """The host of this process. NeMo is the only one."""
    from nemo_minitron.hosts.nemo.host import NEMO

    return NEMO
