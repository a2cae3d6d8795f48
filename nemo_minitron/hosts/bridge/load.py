"""Imports Megatron-Bridge on a machine that may lack Transformer Engine."""

from __future__ import annotations

import functools
import importlib.machinery
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import nemo_minitron.backend as backend

ENGINE = "transformer_engine"
MISSING = "absent"


@functools.cache
def load_bridge() -> ModuleType:
    """The package `megatron.bridge`, with `backend.setup()` before it.

    Bridge's LoRA layers inherit from Transformer Engine's, so its import fails without them. If Transformer Engine
    cannot run here, empty classes stand in its place during the import, and nowhere else.
    """
    reference = backend.setup().reference
    import megatron.core.extensions  # noqa: F401 (it must not see the empty classes)

    stubs = _stubs() if reference else {}
    hidden: dict[str, Any] = {name: sys.modules.get(name, MISSING) for name in stubs}
    sys.modules.update(stubs)
    try:
        import megatron.bridge as bridge
    finally:
        for name, module in hidden.items():
            sys.modules.pop(name, None)
            if module is not MISSING:
                sys.modules[name] = module
    return bridge


def _stubs() -> dict[str, ModuleType]:
    """The modules of Transformer Engine that Bridge imports, with the classes that its LoRA layers inherit from."""
    import torch

    package, layers = _module(ENGINE), _module(f"{ENGINE}.pytorch")
    for name in ("Linear", "LayerNormLinear", "TransformerLayer"):
        setattr(layers, name, type(name, (torch.nn.Module,), {}))
    layers.ops = SimpleNamespace(Sequential=torch.nn.Sequential)  # type: ignore[attr-defined]
    package.pytorch, package.__version__ = layers, "2.9.0"  # type: ignore[attr-defined]
    return {ENGINE: package, f"{ENGINE}.pytorch": layers}


def _module(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = []
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    return module
