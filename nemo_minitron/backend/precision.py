"""A precision by name -> Megatron's own fields on Transformer Engine, or the reference layers' emulation.

Megatron reads `fp8` and related fields from a config. Here they are set only on the live config, after NeMo has
recorded what it was constructed with. Under NeMo's trainer the precision plugin also writes them into that record, as
in any FP8 run of NeMo. Then a checkpoint's context has them, and another plugin that loads it overrides them. Without
Transformer Engine they stay unset, and `emulated_fp8` names the recipe that the reference layers follow (`fp8.py`).
"""

from __future__ import annotations

from typing import Any

import nemo_minitron.backend as backend
from nemo_minitron.errors import InputError
from nemo_minitron.precisions import EMULATED, FP8, HISTORY, check_precision

ALGORITHM = "max"  # of delayed scaling, as in NeMo's own recipe


def megatron_fields(precision: str) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig and, by the same names, arguments of NeMo's MegatronMixedPrecision.

    Empty without FP8. Hybrid is E4M3 in the forward pass and E5M2 in the backward pass; blocks are E4M3 in both.
    Parameters stay in bf16 (`fp8_param_gather` off), because a student is read, cut and written as it is trained.
    Raises InputError for an unknown precision.
    """
    check_precision(precision)
    if precision not in FP8:
        return {}
    fields: dict[str, Any] = {
        "fp8": "e4m3" if precision == "fp8-blockwise" else "hybrid", "fp8_recipe": FP8[precision],
        "fp8_param_gather": False,
    }  # fmt: skip
    if precision == "fp8-delayed":
        fields |= {"fp8_margin": 0, "fp8_amax_history_len": HISTORY, "fp8_amax_compute_algo": ALGORITHM}
    return fields


def unsupported(precision: str, capability: tuple[int, int], cuda: tuple[int, int], engine: str) -> str:
    """Why Transformer Engine of version `engine` cannot do this precision on such a device and CUDA. Empty if it can.

    Its own conditions: FP8 needs Ada or newer. Blocks need Hopper with CUDA 12.9; since 2.9 the first Blackwells do,
    too, which run them as MXFP8. Each recipe needs a version.
    """
    from nemo_minitron.backend.versions import fits

    since = {"fp8-current": "2.2", "fp8-blockwise": "2.3"}.get(precision, "1.0")
    if precision not in FP8:
        return ""
    if capability < (8, 9):
        return f"FP8 needs compute capability 8.9, the device has {capability[0]}.{capability[1]}"
    last = 11 if fits(engine, ">=2.9.dev0") else 9
    if precision == "fp8-blockwise" and not 9 <= capability[0] <= last:
        return f"blocks need compute capability 9.0 to {last}.x, the device has {capability[0]}.{capability[1]}"
    if precision == "fp8-blockwise" and cuda < (12, 9):
        return f"blocks need CUDA 12.9, torch was built with {cuda[0]}.{cuda[1]}"
    if not fits(engine, f">={since}"):
        return f"it needs Transformer Engine {since}, {engine} is installed"
    return ""


def recipe_of(config: Any) -> str | None:
    """Megatron's name of the FP8 recipe of a live config, under Transformer Engine or emulated. None without FP8."""
    recipe = config.fp8_recipe if getattr(config, "fp8", None) else getattr(config, EMULATED, None)
    return None if recipe is None else str(getattr(recipe, "value", recipe))


def legal_here() -> dict[str, str]:
    """Each FP8 precision -> why it cannot run here; empty if it can. Without Transformer Engine all are emulated."""
    if backend.setup().reference:
        return dict.fromkeys(FP8, "")
    import torch

    from nemo_minitron.backend.versions import installed

    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    device = (torch.cuda.get_device_capability(), (int(major), int(minor)), installed("transformer-engine") or "0")
    return {name: unsupported(name, *device) for name in FP8}


def apply(config: Any, precision: str, *, training: bool = False) -> None:
    """Sets a precision on a live Megatron config, before its model is built.

    `training`: whether the model takes steps. Under Transformer Engine delayed scaling moves its scales only in passes
    with gradients (its autocast asks `torch.is_grad_enabled`), so a model that only runs forward would keep them at 1.
    Raises InputError for a precision that this machine cannot do, with the nearest one that it can.
    """
    fields = trained_fields(precision) if training else forward_fields(precision)
    for name, value in fields.items():
        setattr(config, name, value)
    if precision in FP8 and backend.setup().reference:
        setattr(config, EMULATED, FP8[precision])


def trained_fields(precision: str) -> dict[str, Any]:
    """`megatron_fields`, or nothing if this machine has no Transformer Engine. Raises InputError as `apply` does."""
    fields = megatron_fields(precision)
    if not fields or backend.setup().reference:
        return {}
    legal = legal_here()
    if legal[precision]:
        near = next((name for name, why in legal.items() if not why), "bf16")
        raise InputError(f"precision '{precision}' cannot run here: {legal[precision]}; the nearest legal is '{near}'")
    return fields


def forward_fields(precision: str) -> dict[str, Any]:
    """`trained_fields` of a model that takes no steps. Raises InputError as `apply` does."""
    fields = trained_fields(precision)
    if fields and precision == "fp8-delayed":
        raise InputError(
            "precision 'fp8-delayed' moves its scales in training steps alone under Transformer Engine, and this "
            "model takes none; the nearest legal is 'fp8-current'"
        )
    return fields
