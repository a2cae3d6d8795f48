"""CUDA calls on a machine without CUDA: they go to the CPU, to its random generator, or nowhere.

`torch.cuda.is_available()` stays False and `device_count()` stays 0, so Lightning, transformers and torch itself still
choose the CPU and gloo. Only those calls are redirected that Megatron and NeMo make without asking.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nemo_minitron.backend.versions import replace

CPU = torch.device("cpu")


class Idle:
    """A stream, event or context on a machine that has none. Everything one could wait for is already done."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> Idle:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    synchronize = wait = wait_stream = wait_event = record = nothing

    def record_event(self, event: Any = None) -> Any:
        return event or self

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


def _nothing() -> Callable[..., None]:
    """A new function that does nothing. torch.compile's tables need a separate object for each name."""
    return lambda *args, **kwargs: None


def _get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _seed(seed: int) -> None:
    # not torch.manual_seed: that one calls torch.cuda.manual_seed_all
    torch.default_generator.manual_seed(int(seed))


def _idle() -> Callable[..., Idle]:
    return lambda *args, **kwargs: Idle()


CUDA: dict[str, Any] = {
    "current_device": lambda: CPU,
    "set_device": _nothing(),
    "synchronize": _nothing(),
    "empty_cache": _nothing(),
    "reset_peak_memory_stats": _nothing(),
    "memory_stats": lambda *args, **kwargs: {},
    **{name: lambda *args, **kwargs: 0 for name in ("memory_allocated", "max_memory_allocated", "memory_reserved")},
    "manual_seed": _seed,
    "get_rng_state": _get_state,
    "set_rng_state": _set_state,
    "Stream": type("Stream", (Idle,), {}),
    "Event": type("Event", (Idle,), {}),
    "stream": _idle(),
    "current_stream": _idle(),
    "default_stream": _idle(),
    "set_stream": _nothing(),
}
NVTX = {"range_push": _nothing(), "range_pop": _nothing(), "mark": _nothing(), "range": _idle()}
TYPES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")


def redirect() -> None:
    """Redirects torch's and Megatron's CUDA calls for the rest of this process (and of this thread)."""
    import torch._dynamo

    # Megatron's small fusions are torch.compile'd. Compilation cannot see through the mode below, and on a CPU it costs
    # more than it saves. So compiled functions run as they are written.
    torch._dynamo.config.disable = True
    for name, value in CUDA.items():
        replace(torch.cuda, name, value)
    for name in ("get_rng_state", "set_rng_state", "manual_seed"):
        replace(torch.cuda.random, name, CUDA[name])
    for name, value in NVTX.items():
        replace(torch.cuda.nvtx, name, value)
    for name in TYPES:  # torch.cuda.LongTensor([1])
        replace(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    Redirect().__enter__()  # never left
    _megatron_rng()
    _megatron_virtual_stages()


def _megatron_rng() -> None:
    import megatron.core.tensor_parallel.random as random

    replace(random, "_get_cuda_rng_state", _get_state)
    replace(random, "_set_cuda_rng_state", _set_state)
    # Both generators are the same here, so Megatron's check that the CPU's generator did not move always fails.
    logger = logging.getLogger(random.__name__)
    logger.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _megatron_virtual_stages() -> None:
    """Mends two silent errors of virtual pipeline stages over gloo.

    With two stages the next rank is also the previous one. A batch of sends and receives between the same two ranks
    then mixes up activations and gradients. Megatron's own launcher refuses this, but NeMo does not. Sent one by one
    they arrive in order. And Megatron frees an output while it is still being sent: CUDA's streams allow that, gloo
    does not.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.utils import get_model_config

    original = schedules.forward_backward_pipelining_with_interleaving

    @functools.wraps(original)
    def mended(*, model: Any, **options: Any) -> Any:
        config = get_model_config(model[0])
        config.deallocate_pipeline_outputs = False
        if parallel_state.get_pipeline_model_parallel_world_size() == 2:
            config.overlap_p2p_comm, config.batch_p2p_comm = True, False
        return original(model=model, **options)

    replace(schedules, "forward_backward_pipelining_with_interleaving", mended)


# -- tensors -----------------------------------------------------------------------------------------------
def _is_cuda(value: Any) -> bool:
    if isinstance(value, str):
        return value.startswith("cuda")
    return isinstance(value, torch.device) and value.type == "cuda"


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args and type(args[0]) is int:  # a device's index
        args = (CPU, *args[1:])
    args = tuple(CPU if _is_cuda(value) else value for value in args)
    if "device" in kwargs:
        kwargs = _on_cpu(kwargs)
    return tensor.to(*args, **kwargs)


def _self(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


def _type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """For Megatron the name of a CUDA type: its optimizers and its clipping look for 'torch.cuda.FloatTensor'."""
    if args or kwargs:
        return tensor.type(*args, **kwargs)
    caller = sys._getframe(2).f_globals.get("__name__", "")
    name = tensor.type()
    return name.replace("torch.", "torch.cuda.", 1) if caller.startswith("megatron.") else name


HANDLERS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.to: _to,
    torch.Tensor.cuda: _self,
    torch.Tensor.pin_memory: _self,
    torch.Tensor.record_stream: _nothing(),
    torch.Tensor.type: _type,
}


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    device = kwargs.get("device")
    if _is_cuda(device) or type(device) is int:
        kwargs["device"] = CPU
    return kwargs


class Redirect(TorchFunctionMode):
    """Gets every torch function of this thread. Most calls cost one look-up and one test."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        if not kwargs:
            return func(*args)
        if "device" in kwargs or "pin_memory" in kwargs:
            kwargs = _on_cpu(kwargs)
        return func(*args, **kwargs)
