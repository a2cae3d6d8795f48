"""One micro-batch of a depth scan: this rank's part of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_minitron.backend.differences import batch_on_this_cp_rank
from nemo_minitron.errors import InputError
from nemo_minitron.importance.batches import Batch, length_multiple

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

READ = ("tokens", "labels", "loss_mask", "position_ids")
REFUSED = ("attention_mask", "cu_seqlens")  # a scan takes complete, causal rows and would ignore them


@dataclasses.dataclass(frozen=True)
class Rows:
    """int64 [B, S/cp] each. `mask` is bool: True where the prediction of `labels` counts."""

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    position_ids: Tensor


def rows_of(batch: Batch | Tensor, config: TransformerConfig, device: torch.device) -> Rows:
    """A batch of complete rows -> this context-parallel rank's part of them.

    `batch`: an int64 [B, S] tensor, or a mapping with `tokens` and optionally `labels` (default: the next token),
    `loss_mask` and `position_ids`. Without labels the last position of a row does not count. If the layout cannot
    divide the rows, they get masked tokens at their end, which causal attention never reads. Raises InputError for
    shapes that differ, for attention masks and for packed rows.
    """
    parts = _checked(dict(batch) if isinstance(batch, Mapping) else {"tokens": batch})
    tokens = parts["tokens"].to(device, torch.int64)
    order = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    mask = parts["loss_mask"].to(device) > 0 if "loss_mask" in parts else torch.ones_like(tokens, dtype=torch.bool)
    if "labels" in parts:
        labels = parts["labels"].to(device, torch.int64)
    else:
        labels, mask = tokens.roll(-1, dims=1), mask & (order < tokens.shape[1] - 1)
    positions = parts["position_ids"].to(device, torch.int64) if "position_ids" in parts else order
    uncut = {"tokens": tokens, "labels": labels, "mask": mask, "position_ids": positions}
    return Rows(**batch_on_this_cp_rank({name: _padded(x, config) for name, x in uncut.items()}))


def _checked(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a batch that are not None. All have one shape."""
    tensors = {name: torch.as_tensor(x) for name, x in parts.items() if name in (*READ, *REFUSED) and x is not None}
    for name in REFUSED:
        if name in tensors:
            raise InputError(f"a batch has '{name}'; a scan of depth takes whole causal rows, one sample each")
    if "tokens" not in tensors:
        raise InputError(f"a batch has {', '.join(sorted(map(str, parts))) or 'nothing'}, but no 'tokens'")
    shapes = {tuple(x.shape) for x in tensors.values()}
    if len(shapes) > 1 or tensors["tokens"].dim() != 2:
        raise InputError(
            f"a batch has tensors of {sorted(shapes)}; legal is one shape [batch, sequence] for all of them"
        )
    return tensors


def _padded(x: Tensor, config: TransformerConfig) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[1] % length_multiple(config, x.shape[0])))


def all_rows(batches: Iterable[Batch | Tensor], config: TransformerConfig, device: torch.device) -> Iterable[Rows]:
    """One micro-batch at a time. Raises InputError if there is none."""
    empty = True
    for batch in batches:
        empty = False
        yield rows_of(batch, config, device)
    if empty:
        raise InputError("no calibration batches were given; at least one is needed")
