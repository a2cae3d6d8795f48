"""Imports Megatron-Bridge on a machine that may lack Transformer Engine and Energon, the loader of pictures."""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import nemo_minitron.backend as backend
from nemo_minitron.backend.versions import replace

ENGINE = "transformer_engine"
ENERGON = "megatron.energon"
# How the parameters of the twin's classes are divided: Bridge's own loading and saving of Hugging Face weights asks.
TWINS = {
    "Attention": "column", "ColumnLinear": "column", "LayerNormColumnParallelLinear": "column", "Linear": "replicated",
    "Norm": "replicated", "RowLinear": "row",
}  # fmt: skip


@functools.cache
def load_bridge() -> ModuleType:
    """The package `megatron.bridge`, with `backend.setup()` before it.

    Bridge's LoRA layers inherit from Transformer Engine's, so its import fails without them. If Transformer Engine
    cannot run here, empty classes stand in its place during the import, and nowhere else.
    """
    reference = backend.setup().reference
    import megatron.core.extensions  # noqa: F401 (it must not see the empty classes)

    with _standing_in(_engine() if reference else {}):
        import megatron.bridge as bridge
    if reference:
        from megatron.bridge.models.conversion.param_mapping import AutoMapping

        for name, how in TWINS.items():
            AutoMapping.register_module_type(name, how)
    return bridge


@functools.cache
def load_training() -> ModuleType:
    """The module `megatron.bridge.training.train`, and with it all that a training needs.

    It imports Energon, which loads pictures and is never used for text. If Energon is not installed, empty classes
    stand in its place during the import, and nowhere else.
    """
    load_bridge()
    with _standing_in({}) if importlib.util.find_spec(ENERGON) else _energon():
        import megatron.bridge.training.pretrain  # noqa: F401
        import megatron.bridge.training.train as train
    from megatron.bridge.training import initialize

    replace(initialize, "_warmup_jit_function", _warm_up(initialize._warmup_jit_function))
    return train


def _warm_up(original: Callable[..., None]) -> Callable[..., None]:
    """Bridge compiles small functions before the first step, for a gated MLP on rows of half its width: it fails where
    a rank's width is odd, which a cut can make it. They are then compiled in the first step."""

    def warm_up(config: Any, micro_batch_size: int) -> None:
        if config.ffn_hidden_size // config.tensor_model_parallel_size % 2 == 0:
            original(config, micro_batch_size)

    return warm_up


def setup() -> None:
    """Makes Megatron-Bridge run on this machine and imports it, before anything else does. Only the first call of a
    process does something. Raises InputError as `backend.setup`."""
    load_training()


@contextlib.contextmanager
def _standing_in(stubs: dict[str, ModuleType]) -> Iterator[None]:
    """A context in which imports find the stubs. Afterwards they find what they found before."""
    hidden = {name: sys.modules[name] for name in stubs if name in sys.modules}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


def _engine() -> dict[str, ModuleType]:
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


@contextlib.contextmanager
def _energon() -> Iterator[None]:
    """A context in which every module of Energon can be imported, and every name in it is an empty class."""
    finder = _Energon()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if f"{name}.".startswith(f"{ENERGON}.")]:
            del sys.modules[name]


class _Empty(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__class_getitem__": classmethod(lambda kind, _: kind)})


class _Energon(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        if f"{name}.".startswith(f"{ENERGON}."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
