"""Transformer Engine and its kin: whether they can run here, and out of Megatron's sight where they cannot.

Megatron and NeMo ask by `import transformer_engine`, and take an ImportError alone for a no. The package without its
compiled libraries raises RuntimeError, one without a driver OSError: Megatron then does not import at all. And where
it imports on a machine without a GPU, Megatron picks its fused Adam and norms of gradients, which want CUDA tensors.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ENGINE = ("transformer_engine", "transformer_engine_torch")
CUDA_ALONE = ("apex", "amp_C", "fused_weight_gradient_mlp_cuda")  # NVIDIA's apex: Megatron's second choice
logger = logging.getLogger(__name__)


def usable() -> bool:
    """Whether Transformer Engine's PyTorch modules can be imported."""
    if importlib.util.find_spec(ENGINE[0]) is None:
        return False
    try:
        importlib.import_module(f"{ENGINE[0]}.pytorch")
    except Exception as error:  # asserts, missing libraries, failed look-ups: it raises whatever it meets
        logger.warning("Transformer Engine is installed and does not import: %s: %s", type(error).__name__, error)
        return False
    return True


def hide(cpu: bool) -> None:
    """Importing Transformer Engine, and without a GPU apex, raises ImportError for the rest of this process.

    What Megatron has imported already it keeps; then a warning says so.
    """
    if cpu:  # Megatron compiles a piece of CUDA when it is imported, and torch asks the GPU for which one
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    for name in ENGINE + (CUDA_ALONE if cpu else ()):
        if _there(name):
            for loaded in [key for key in sys.modules if key.split(".")[0] == name]:
                del sys.modules[loaded]
            sys.modules[name] = None  # type: ignore[assignment]
            if "megatron.core.optimizer" in sys.modules:
                logger.warning("Megatron was imported before setup(), with %s, which cannot run here", name)


def _there(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None


def refusal() -> str:
    """The last line of what Transformer Engine's import says in a process of its own; empty where it imports."""
    command = [sys.executable, "-W", "ignore", "-c", f"import torch, {ENGINE[0]}.pytorch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def builds_left() -> list[Path]:
    """Locks of what Megatron-core compiles when it is imported: a build under way, or one that was killed, for whose
    end every later import of Megatron waits without a word."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "torch_extensions"
    place = Path(os.environ.get("TORCH_EXTENSIONS_DIR", cache))
    return sorted({*place.glob("managed_alloc_runtime/lock"), *place.glob("*/managed_alloc_runtime/lock")})


def forget_copies(model: Any) -> None:
    """Drops the FP8 copies of weights that Transformer Engine's modules keep from one pass to the next, which a move
    to another device leaves behind; the next pass makes them anew. Nothing elsewhere."""
    for module in model.modules():
        getattr(module, "_fp8_workspaces", {}).clear()


def compiled() -> bool:
    """Whether the package has its compiled part for PyTorch, where it looks for that itself. Imports nothing."""
    spec = importlib.util.find_spec(ENGINE[0])
    if spec is None or spec.origin is None:
        return False
    package = Path(spec.origin).parent
    own = (folder.glob(f"{ENGINE[1]}*.so") for folder in (package.parent, package, package / "wheel_lib"))
    return any(any(found) for found in own) or importlib.util.find_spec(ENGINE[1]) is not None
