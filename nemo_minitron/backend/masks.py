"""The attention mask that comes with a user's batch: padding may stand behind a sample, and not in front of it.

Megatron counts positions from the start of a row, Transformer Engine's causal attention reads no mask, a layer with a
window makes its own, and a Mamba layer's state runs through every token. So a causal model needs no mask for padding on
the right, which no token of the sample sees, and would take padding on the left for text.

Shapes (docs/shapes.md): S positions of the queries, P positions of the keys, B sequences.
"""

from __future__ import annotations

from torch import Tensor

from nemo_minitron.errors import InputError


def given_mask(mask: Tensor | None) -> Tensor | None:
    """The mask that a causal model is given for a batch's `attention_mask`.

    Megatron's [B, 1, S, P] stays as it is: True, or 1, where a query must not see a key. transformers' [B, S], 0 where
    a row is padded, becomes None. Raises InputError if a token that counts would not see the first one of its row, as
    with padding on the left and with several samples in a row.
    """
    if mask is None or mask.dim() < 2:  # NeMo's packed rows come with a placeholder
        return mask
    if mask.dim() == 2:
        seen_BS = mask > 0
        hidden = (seen_BS[:, 1:] & ~seen_BS[:, :-1]).any()
    else:
        seen_B1SP = mask < 0.5
        hidden = (seen_B1SP.any(-1) & ~seen_B1SP[..., 0]).any()
    if hidden:
        raise InputError(
            "a batch's attention_mask hides the start of a row, as padding on the left does; Megatron counts positions "
            "from there, and a Mamba layer's state begins there: pad on the right, or join samples by cu_seqlens"
        )
    return None if mask.dim() == 2 else mask
