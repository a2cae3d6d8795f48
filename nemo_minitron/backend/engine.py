"""Transformer Engine, apex and Mamba's kernels: whether they can run here. If Transformer Engine and apex cannot, they
are hidden from Megatron.

Megatron and NeMo try `import transformer_engine`, and only an ImportError means no to them. The package without its
compiled libraries raises RuntimeError, and without a driver OSError; then Megatron does not import at all. If it does
import on a machine without a GPU, Megatron uses its fused Adam and gradient norms, which need CUDA tensors.
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
MAMBA = ("mamba_ssm", "causal_conv1d")  # the first calls the second
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


def scans() -> bool:
    """Whether the kernels for Mamba-2 are installed, all of them. Imports nothing."""
    return all(importlib.util.find_spec(name) is not None for name in MAMBA)


def hide(cpu: bool) -> None:
    """Makes the import of Transformer Engine, and without a GPU of apex, raise ImportError in this process.

    Megatron keeps what it has imported before. A warning then says so.
    """
    if cpu:  # Megatron compiles some CUDA code when it is imported, and torch would ask the GPU for its architecture
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    for name in ENGINE + (CUDA_ALONE if cpu else ()):
        if _importable(name):
            for loaded in [key for key in sys.modules if key.split(".")[0] == name]:
                del sys.modules[loaded]
            sys.modules[name] = None  # type: ignore[assignment]
            if "megatron.core.optimizer" in sys.modules:
                logger.warning("Megatron was imported before setup(), with %s, which cannot run here", name)


def _importable(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None


def refusal() -> str:
    """The last line of the error if Transformer Engine is imported in another process. Empty if it imports."""
    command = [sys.executable, "-W", "ignore", "-c", f"import torch, {ENGINE[0]}.pytorch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def builds_left() -> list[Path]:
    """Locks of what Megatron-core compiles when it is imported. The build is running, or it was killed.

    Every later import of Megatron waits for the end of that build, without a message.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "torch_extensions"
    place = Path(os.environ.get("TORCH_EXTENSIONS_DIR", cache))
    return sorted({*place.glob("managed_alloc_runtime/lock"), *place.glob("*/managed_alloc_runtime/lock")})


def forget_copies(model: Any) -> None:
    """Drops the FP8 copies of weights that Transformer Engine's modules keep between passes.

    A move to another device leaves them on the old one. The next pass makes new copies. Other modules have none.
    """
    for module in model.modules():
        getattr(module, "_fp8_workspaces", {}).clear()


def compiled() -> bool:
    """Whether the package has its compiled part for PyTorch, in the places that it searches. Imports nothing."""
    spec = importlib.util.find_spec(ENGINE[0])
    if spec is None or spec.origin is None:
        return False
    package = Path(spec.origin).parent
    libraries = (folder.glob(f"{ENGINE[1]}*.so") for folder in (package.parent, package, package / "wheel_lib"))
    return any(any(files) for files in libraries) or importlib.util.find_spec(ENGINE[1]) is not None
