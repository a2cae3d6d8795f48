"""Where a model runs: one code path, and three switches that are set once per process.

1. No CUDA: CUDA calls are redirected to the CPU and gloo (`cpu.py`).
2. No Transformer Engine: a pure-PyTorch twin replaces its layers (`reference.py`), on any device.
3. No kernels for Mamba-2: PyTorch's own scan replaces them (`mamba.py`), on any device.

Nothing else in the package asks which device it is on. Importing this module loads neither torch nor Megatron.
"""

from __future__ import annotations

import dataclasses

__all__ = ["Switches", "setup"]


@dataclasses.dataclass(frozen=True)
class Switches:
    """What `setup` turned on. `cpu`: CUDA calls are redirected. `reference`: the twin replaces TE's layers. `scan`:
    PyTorch's scan replaces the kernels of `mamba_ssm` and `causal_conv1d`."""

    cpu: bool
    reference: bool
    scan: bool = False


_switches: Switches | None = None


def setup() -> Switches:
    """Makes Megatron-core and NeMo run on this machine. Only the first call of a process does something.

    Call it before models are built; NeMo may be imported before or after. It imports torch and Megatron, but never
    NeMo: NeMo is adapted right after somebody else imports it (`mends.py`). If the machine has CUDA, Transformer
    Engine and Mamba's kernels, nothing changes. Raises InputError if the installed Megatron-core or NeMo is not a
    supported version.
    """
    from nemo_minitron.backend import mends

    global _switches
    if _switches is None:
        wanted = _wanted()
        if wanted.cpu or wanted.reference:
            _turn(wanted)
        mends.watch(**dataclasses.asdict(wanted))
        _switches = wanted
    return _switches


def _wanted() -> Switches:
    import torch

    from nemo_minitron.backend import engine

    cpu = not torch.cuda.is_available()
    # TE's layers and Mamba's kernels run on CUDA alone
    return Switches(cpu=cpu, reference=cpu or not engine.usable(), scan=cpu or not engine.scans())


def _turn(switches: Switches) -> None:
    from nemo_minitron.backend import configs, differences, engine
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
