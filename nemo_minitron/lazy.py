"""Names of a package that are loaded when they are first used, so that its import stays light."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def loader(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """The function `__getattr__` of a package (PEP 562). `modules`: a name -> the module that has it; a name that
    begins with a dot is relative to the package."""

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(importlib.import_module(modules[name], package), name)

    return load
