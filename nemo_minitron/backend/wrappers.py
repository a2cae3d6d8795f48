"""What NeMo, DDP and mixed precision wrap around a Megatron model."""

from __future__ import annotations

from typing import Any


def unwrap(chunk: Any) -> Any:
    """Megatron's GPTModel inside its wrappers."""
    while "decoder" not in chunk._modules:  # not hasattr: NeMo's wrappers pass attribute look-ups to what they wrap
        chunk = chunk._modules["module"]
    return chunk
