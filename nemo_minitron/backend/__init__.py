"""Where a model runs: one code path, and two switches that are turned once per process.

1. No CUDA: CUDA calls are redirected to the CPU and gloo (`cpu.py`).
2. No Transformer Engine: its layers are replaced by a pure-PyTorch twin (`reference.py`), on any device.

Nothing else in the package asks which device it is on. Importing this module loads neither torch nor Megatron.
"""

from __future__ import annotations

import dataclasses

__all__ = ["Switches", "setup"]


@dataclasses.dataclass(frozen=True)
class Switches:
    """What `setup` turned on: `cpu`, the redirect of CUDA calls; `reference`, the twin of TE's layers."""

    cpu: bool
    reference: bool


_switches: Switches | None = None


def setup() -> Switches:
    """Makes Megatron-core and NeMo run on this machine; idempotent, once per process.

    Call it before models are built; NeMo may be imported before or after. It imports torch and Megatron,
    never NeMo: what NeMo needs is mended right after somebody imports it (`mends.py`). Where CUDA and
    Transformer Engine are both there it changes nothing. Raises InputError where the installed
    Megatron-core or NeMo is outside of the supported versions.
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
    from nemo_minitron.backend import configs, engine, mends
    from nemo_minitron.backend.versions import check

    check()
    if switches.reference:
        engine.hide(switches.cpu)  # before anything imports Megatron
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
