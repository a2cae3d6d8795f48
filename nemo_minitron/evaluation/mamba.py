"""transformers' Mamba-2 mixers without the kernels of `mamba_ssm`, computed as the kernels compute.

transformers' own PyTorch code is another model (4.57 to 5.13, transformers#47246): it carries the states between chunks
wrongly, from the second chunk on, and keeps every step above `time_step_min`. Megatron and the kernels do neither. And
behind a prompt that is padded on the left, its attention layers look at no more than the first position (5.12).

Shapes (docs/shapes.md): B sequences, S positions, H hidden size, X channels of the convolution, A Mamba heads, G their
groups, Y channels of one head, I channels of the state.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

MIXERS = ("NemotronHMamba2Mixer",)


def mend(model: PreTrainedModel) -> None:
    """Gives the mixers of a transformers model a PyTorch forward pass that is exact, and its attention a mask of all
    tokens that a cache has. Where the kernels run, on a GPU, the mixers call those as before."""
    model.base_model.register_forward_pre_hook(_count_tokens, with_kwargs=True)
    for module in model.modules():
        if type(module).__name__ in MIXERS:
            module.torch_forward = functools.partial(_forward, module)


def _count_tokens(model: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Makes a cache count its tokens by an attention layer. transformers counts them by the first layer that is not
    Mamba, which is mostly an MLP: that has 0 tokens for ever, and so the mask of a new token has one key."""
    kinds, cache = list(model.config.layer_types), named.get("past_key_values")
    if cache is None or "attention" not in kinds:
        return
    attention = kinds.index("attention")
    for layer, kind in enumerate(kinds[:attention]):
        if kind != "mamba":
            cache.layers[layer] = cache.layers[attention]


def _forward(mixer: Any, hidden_states: Tensor, cache: Any = None, attention_mask: Tensor | None = None) -> Tensor:
    """[B, S, H] -> [B, S, H]; S tokens behind those that the cache has seen, which may be none."""
    import torch

    from nemo_minitron.backend.ssd import scan, wide

    masked = hidden_states if attention_mask is None else hidden_states * attention_mask[..., None]
    states = mixer.n_groups * mixer.ssm_state_size
    gate, channels_BSX, dt_BSA = mixer.in_proj(masked).split(
        [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1
    )
    known = cache.layers[mixer.layer_idx] if cache is not None and cache.has_previous_state(mixer.layer_idx) else None
    convolved_BSX = _convolve(mixer, channels_BSX, known, cache)
    if attention_mask is not None:
        convolved_BSX = convolved_BSX * attention_mask[..., None]
    x, keys, queries = convolved_BSX.split([mixer.intermediate_size, states, states], dim=-1)
    keys_BSGI, queries_BSGI = (part.unflatten(-1, (mixer.n_groups, -1)) for part in (keys, queries))
    y_BSAY, final_BAYI = scan(
        x.unflatten(-1, (mixer.num_heads, -1)), dt_BSA, -mixer.A_log.to(wide(x.dtype)).exp(), keys_BSGI, queries_BSGI,
        mixer.chunk_size, D=mixer.D, dt_bias=mixer.dt_bias, dt_softplus=True, return_final_states=True,
        initial_states=None if known is None else known.recurrent_states,
    )  # fmt: skip
    if cache is not None:
        cache.update_recurrent_state(final_BAYI, mixer.layer_idx)
    return mixer.out_proj(mixer.norm(torch.flatten(y_BSAY, -2), gate).to(hidden_states.dtype))


def _convolve(mixer: Any, channels_BSX: Tensor, known: Any, cache: Any) -> Tensor:
    """SiLU of the causal convolution [B, S, X]. `known`: the cache's part for this layer, if it has seen tokens."""
    import torch
    import torch.nn.functional as F

    kernel, new_BXS = mixer.conv_kernel_size, channels_BSX.transpose(1, 2)
    before = new_BXS.new_zeros(*new_BXS.shape[:2], kernel) if known is None else known.conv_states.to(new_BXS.dtype)
    joined = torch.cat([before, new_BXS], dim=-1)
    if cache is not None:
        cache.update_conv_state(joined[..., -kernel:], mixer.layer_idx)
    conv = mixer.conv1d
    return F.silu(F.conv1d(joined[..., 1:], conv.weight, conv.bias, groups=conv.groups)).transpose(1, 2)
