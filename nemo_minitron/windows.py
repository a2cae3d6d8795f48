"""Windows of attention: which layers look back over a part of the sequence alone, and what that saves. Plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_minitron.errors import InputError

FIELDS = ("attention_window", "window_attn_skip_freq")  # of Architecture
Freq = tuple[int, ...] | None  # a 1 for each layer that has the window; None: all layers have it


def one_spelling(window: int | None, freq: Any, layers: int) -> tuple[int | None, Freq]:
    """The same values for the same model. Raises InputError if `freq` is no list of a 0 or 1 for each layer."""
    if freq is not None and (not isinstance(freq, tuple) or len(freq) != layers or not set(freq) <= {0, 1}):
        raise InputError(
            f"window_attn_skip_freq is {freq!r}; legal is a 0 or 1 for each of the {layers} layers, or None for all"
        )
    if window is None or (freq is not None and not any(freq)):
        return None, None
    return window, None if freq is None or all(freq) else freq


def seen(window: int | None, freq: Freq, layers: int, context: int) -> int:
    """The tokens that attention looks back on at position `context`, summed over the layers."""
    windowed = sum(freq or (1,) * layers) if window else 0
    return (layers - windowed) * context + windowed * min(context, window or 0)


def of_megatron(window_size: Sequence[int] | None, skip: int | Sequence[int] | None, layers: int) -> dict[str, Any]:
    """Megatron's fields -> Architecture's. `window_size[0]` does not count the current token; a number N in `skip` is
    for every N-th layer, which then has no window."""
    if not window_size or window_size[0] < 0:
        return {}
    if isinstance(skip, int):
        skip = [int((layer + 1) % skip != 0) for layer in range(layers)]
    return {"attention_window": window_size[0] + 1, "window_attn_skip_freq": None if skip is None else tuple(skip)}
