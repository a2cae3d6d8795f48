"""What differs between the versions of Megatron-core, 0.15 to 0.19, in one place.

The rest of the package calls these functions. Each asks Megatron what it has, not which version it is, so that a
release in between is served as well.

| since | what | here |
|---|---|---|
| 0.17 | a spec provider is also asked for `layer_norm(has_residual=...)` | `reference.ReferenceSpecProvider` |
| 0.17 | `grouped_mlp_modules` gives a builder of the experts, and not a class with its submodules | `experts` |
| 0.17 | layer specs choose their provider in a function of their own | `chooses_provider` |
| 0.18 | `get_batch_on_this_cp_rank` needs to know about hybrid context parallelism | `batch_on_this_cp_rank` |
| 0.18 | the dispatcher's `all_to_all` has one more option | `dispatch.py` |
| by 0.19 | routers scale their loss, summed per token, where ranks share the tokens | `routers_scale_themselves` |
| 0.19 | a model multiplies its logits behind the output layer, under MuP | `scaled_logits` |
| by 0.19 | the parameters of packed rows have a field that keeps Mamba's states within a sample | `ends_of_states` |
| 0.19 | the import fails beside nvidia-resiliency-ext below 0.6, which 0.4.1, the last on the index, is | `load` |
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from typing import Any

from torch import Tensor

from nemo_minitron.backend.versions import fits, installed
from nemo_minitron.errors import InputError

RESILIENCY = {"nvidia-resiliency-ext": ">=0.6"}  # what Megatron-core 0.19 needs for asynchronous saving
ASYNCHRONOUS = "nvidia_resiliency_ext.checkpointing.async_ckpt.core"


def load() -> None:
    """Imports Megatron-core. If nvidia-resiliency-ext is too old for it, Megatron does not see its asynchronous saving,
    as if it were not installed."""
    old = any((version := installed(name)) and not fits(version, wanted) for name, wanted in RESILIENCY.items())
    if old and ASYNCHRONOUS not in sys.modules:
        sys.modules[ASYNCHRONOUS] = None  # type: ignore[assignment]  # an import of it raises ImportError
        try:
            importlib.import_module("megatron.core.dist_checkpointing")
        finally:
            del sys.modules[ASYNCHRONOUS]


def chooses_provider(specs: Any) -> bool:
    """Whether the layer specs of this Megatron-core look for `TESpecProvider` in their own module."""
    functions = (value for value in vars(specs).values() if inspect.isfunction(value))
    return any("TESpecProvider" in function.__code__.co_names for function in functions)


def experts(kind: type, submodules: Any) -> Any:
    """What `grouped_mlp_modules` returns for experts of this class."""
    from megatron.core.models.backends import LocalSpecProvider

    asked = inspect.signature(LocalSpecProvider.grouped_mlp_modules).parameters
    if "moe_use_legacy_grouped_gemm" in asked:
        return kind, submodules
    return functools.partial(kind, submodules=submodules)


def check_biased_experts(config: Any) -> None:
    """Raises InputError for experts with biases under tensor parallelism, unless it is Megatron-core 0.19, where their
    training equals one process's; on 0.15 the loss after a step was another one (by 5e-5 of itself)."""
    if config.tensor_model_parallel_size > 1 and not fits(installed("megatron-core") or "0", ">=0.19.dev0"):
        raise InputError(
            f"experts with biases at tp={config.tensor_model_parallel_size} need Megatron-core 0.19, which "
            "Megatron-Bridge has; the nearest legal tp is 1"
        )


def batch_on_this_cp_rank(batch: dict[str, Any]) -> dict[str, Tensor]:
    """This context-parallel rank's part of each tensor, cut along dimension 1, as Megatron cuts a batch."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters:
        group = parallel_state.get_context_parallel_group()  # without it Megatron cuts among all ranks
        return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    return get_batch_on_this_cp_rank(batch)


def routers_scale_themselves() -> bool:
    """Whether Megatron's routers multiply their loss by the number of tensor- and context-parallel ranks among which
    the tokens are cut. Without that the loss is as many times too small, if losses are summed per token."""
    from megatron.core.transformer.moe.router import TopKRouter

    return "tp_cp_group" in TopKRouter.attach_and_log_load_balancing_loss.__code__.co_names


def scaled_logits(model: Any, logits: Tensor) -> Tensor:
    """The output layer's logits as the model gives them: multiplied by `mup_output_mult`, if its config says so."""
    scale = getattr(model, "_scale_logits", None)
    return logits if scale is None else scale(logits)


def ends_of_states(tokens: int, hybrid: bool) -> dict[str, int]:
    """What `PackedSeqParams` of a row of `tokens` tokens needs beside its samples' ends: without it a Mamba layer's
    states would run on into the next sample. Raises InputError for a hybrid if this Megatron-core has no such field."""
    from megatron.core.packed_seq_params import PackedSeqParams

    if "total_tokens" in PackedSeqParams.__dataclass_fields__:
        return {"total_tokens": tokens}
    if hybrid:
        raise InputError(
            "packed rows (cu_seqlens) of a hybrid with Mamba need Megatron-core 0.19, which Megatron-Bridge has; legal "
            "are rows of one sample"
        )
    return {}


def caps_logits(model: Any) -> bool:
    """Whether the output layer caps its logits (Gemma 2), so that they are not the states times its weight."""
    return getattr(model.config, "final_logit_softcapping", None) is not None
