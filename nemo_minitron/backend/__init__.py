"""Where a model runs: one code path, and two switches that are set once per process.

1. No CUDA: CUDA calls are redirected to the CPU and gloo (`cpu.py`).
2. No Transformer Engine: a pure-PyTorch twin replaces its layers (`reference.py`), on any device.

Nothing else in the package asks which device it is on. Importing this module loads neither torch nor Megatron.
"""

from __future__ import annotations

import dataclasses

__all__ = ["Switches", "setup"]


@dataclasses.dataclass(frozen=True)
class Switches:
    """What `setup` turned on. `cpu`: CUDA calls are redirected. `reference`: the twin replaces TE's layers."""

    cpu: bool
    reference: bool


_switches: Switches | None = None


def setup() -> Switches:
    """Makes Megatron-core and NeMo run on this machine. Only the first call of a process does something.

    Call it before models are built; NeMo may be imported before or after. It imports torch and Megatron, but never
    NeMo: NeMo is adapted right after somebody else imports it (`mends.py`). If the machine has CUDA and Transformer
    Engine, nothing changes. Raises InputError if the installed Megatron-core or NeMo is not a supported version.
    """
    global _switches
    if _switches is None:
        wanted = _wanted()
        if wanted.cpu or wanted.reference:
            _turn(wanted)
        _switches = wanted
    return _switches


def _wanted() -> Switches:
    import torch

    from nemo_minitron.backend import engine

    cpu = not torch.cuda.is_available()
    return Switches(cpu=cpu, reference=cpu or not engine.usable())  # TE's layers run on CUDA alone


def _turn(switches: Switches) -> None:
    from nemo_minitron.backend import configs, differences, engine, mends
    from nemo_minitron.backend.versions import check

    check()
    if switches.reference:
        engine.hide(switches.cpu)  # before anything imports Megatron
    differences.load()
    if switches.cpu:
        from nemo_minitron.backend import cpu, dispatch

        cpu.redirect()
        dispatch.redirect()
    configs.switch_off(switches.cpu, switches.reference)
    if switches.reference:
        from nemo_minitron.backend import optimizer, reference

        reference.install()
        optimizer.install()
    mends.watch(switches.cpu, switches.reference)
