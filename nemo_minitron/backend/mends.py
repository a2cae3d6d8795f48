"""Changes to modules of other packages, made right after they are imported. One table names the modules.

NeMo is never imported from here. A change is made when somebody else imports the module, or at once if it is imported
already.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from nemo_minitron.backend.versions import replace

Mend = Callable[[ModuleType], None]


def _models(package: ModuleType) -> None:
    """NeMo's default layer spec and forward step choose Transformer Engine's layers, which the twin replaces.

    This runs after the whole package is imported: with HAVE_TE some of its files ask for TE's version.
    """
    replace(sys.modules[f"{package.__name__}.base"], "HAVE_TE", True)


def _data(module: ModuleType) -> None:
    """With HAVE_TE the dataset makes no mask of [S, S] for each sample. Causal attention does not need one."""
    replace(module, "HAVE_TE", True)


def _seeding(init: ModuleType) -> None:
    """NeMo seeds Megatron's random generators only if it sees a CUDA device. Here they are always seeded."""
    original = init._set_random_seed

    def seed_all(seed_: int) -> None:
        from megatron.core import parallel_state, tensor_parallel

        original(seed_)
        stage = parallel_state.get_pipeline_model_parallel_rank()
        tensor_parallel.model_parallel_cuda_manual_seed(seed_ + 100 * stage)

    replace(init, "_set_random_seed", seed_all)


def _reading(pl: ModuleType) -> None:
    """NeMo's checkpoint reader asserts CUDA before it moves tensors to their GPU. Here they stay on the CPU."""
    replace(pl, "_fix_tensors_device", lambda checkpoint: checkpoint)


def _starting(initialize: ModuleType) -> None:
    """Bridge starts a training only with CUDA, seeds Megatron only if it sees a CUDA device, and compiles Megatron's
    C++ helpers of datasets with a Makefile, though Megatron's wheel has them compiled and has no Makefile."""
    begin, seed_torch = initialize.initialize_megatron, initialize._set_random_seed

    def seed_all(seed_: int, *arguments: Any, **options: Any) -> None:
        from megatron.core import parallel_state, tensor_parallel

        seed_torch(seed_, *arguments, **options)
        stage = parallel_state.get_pipeline_model_parallel_rank()
        tensor_parallel.model_parallel_cuda_manual_seed(seed_ + 100 * stage)

    replace(initialize, "initialize_megatron", functools.partial(begin, allow_no_cuda=True))
    replace(initialize, "_set_random_seed", seed_all)
    replace(initialize, "compile_helpers", lambda: None)


def _mixer(module: ModuleType) -> None:
    """Without the kernels of `mamba_ssm` Megatron's mixer cannot be built."""
    from nemo_minitron.backend import mamba

    mamba.mend(module)


CPU: dict[str, Mend] = {
    "megatron.bridge.training.initialize": _starting,
    "nemo.lightning.megatron_init": _seeding,
    "nemo.lightning.io.pl": _reading,
}
REFERENCE: dict[str, Mend] = {
    "nemo.collections.llm.gpt.model": _models,
    "nemo.collections.llm.gpt.data.pre_training": _data,
    "nemo.collections.llm.gpt.data.mock": _data,
}
SCAN: dict[str, Mend] = {"megatron.core.ssm.mamba_mixer": _mixer}


def watch(cpu: bool, reference: bool, scan: bool = False) -> None:
    """Changes the table's modules that are loaded, and the others when they are imported."""
    table = (CPU if cpu else {}) | (REFERENCE if reference else {}) | (SCAN if scan else {})
    for name, mend in table.items():
        if name in sys.modules:
            mend(sys.modules[name])
    if later := {name: mend for name, mend in table.items() if name not in sys.modules}:
        sys.meta_path.insert(0, _Finder(later))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what the other finders find, and makes a module's change after the module has run."""

    def __init__(self, mends: dict[str, Mend]) -> None:
        self._mends = mends

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        mend = self._mends.get(name)
        if mend is None:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                _follow(spec.loader, mend)
                return spec
        return None


def _follow(loader: Any, mend: Mend) -> None:
    execute = loader.exec_module

    def execute_and_mend(module: ModuleType) -> None:
        execute(module)
        mend(module)

    loader.exec_module = execute_and_mend
