"""The scan of Mamba-2 in PyTorch (2405.21060, section 6): within a chunk by products of matrices, and from chunk to
chunk by the recurrence of the states.

It computes in fp32 (fp64 stays fp64), and rounds where the kernels of `mamba_ssm` round. Autograd gives its gradients.

Shapes (docs/shapes.md): B sequences, S positions of the sequence, T its chunks, Q positions of a chunk, A Mamba heads
of this rank (behind G: of a group), G their groups, Y channels of one head, I channels of the state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_minitron.errors import InputError


def scan(
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    keys: Tensor,
    queries: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """x [B, S, A, Y] -> y of its shape and dtype, and the states [B, A, Y, I] behind the last position if asked for.

    At each position the state is multiplied by exp(dt * decay) and gets dt * x times its key; y is the state times its
    query, plus D * x, times silu(z). `dt` is [B, S, A], `decay` and `dt_bias` [A], `D` [A] or [A, Y]; `keys` and
    `queries` [B, S, G, I] are the paper's B and C. Raises InputError for packed sequences.
    """
    refuse_packed(seq_idx)
    dtype, groups, size = wide(x.dtype), keys.shape[2], min(chunk_size, x.shape[1])
    dt_BSA = _step(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
    of_heads = [part.unflatten(2, (groups, -1)) for part in (x * dt_BSA[..., None], decay * dt_BSA)]
    of_chunks = [_chunks(part.to(dtype), size) for part in (*of_heads, keys, queries)]
    start_BGAYI = None if initial_states is None else initial_states.to(dtype).unflatten(1, (groups, -1))
    y_BTQGAY, final_BGAYI = _over_chunks(of_chunks, start_BGAYI)
    y_BSAY = y_BTQGAY.flatten(1, 2)[:, : x.shape[1]].flatten(2, 3)
    if D is not None:
        y_BSAY = y_BSAY + x.to(dtype) * (D if D.dim() == 2 else D[:, None])
    if z is not None:
        y_BSAY = y_BSAY * F.silu(z.to(dtype))
    y = y_BSAY.to(x.dtype)
    return (y, final_BGAYI.flatten(1, 2)) if return_final_states else y


def _over_chunks(of_chunks: list[Tensor], start_BGAYI: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each chunk by products of matrices, and from chunk to chunk the recurrence of the states."""
    x_BTQGAY, rate_BTQGA, keys_BTQGI, queries_BTQGI = of_chunks
    passed_BTGAQ = rate_BTQGA.permute(0, 1, 3, 4, 2).cumsum(-1)
    products_BTGQQ = torch.einsum("btqgi,btpgi->btgqp", queries_BTQGI, keys_BTQGI)
    weights_BTGAQQ = products_BTGQQ[:, :, :, None] * _decays(passed_BTGAQ)
    y_BTQGAY = torch.einsum("btgaqp,btpgay->btqgay", weights_BTGAQQ, x_BTQGAY)
    left_BTGAQ = (passed_BTGAQ[..., -1:] - passed_BTGAQ).exp()
    added_BTGAYI = torch.einsum("btgaq,btqgay,btqgi->btgayi", left_BTGAQ, x_BTQGAY, keys_BTQGI)
    whole_BTGA = passed_BTGAQ[..., -1].exp()
    state_BGAYI = torch.zeros_like(added_BTGAYI[:, 0]) if start_BGAYI is None else start_BGAYI
    before = []
    for chunk in range(added_BTGAYI.shape[1]):
        before.append(state_BGAYI)
        state_BGAYI = state_BGAYI * whole_BTGA[:, chunk, :, :, None, None] + added_BTGAYI[:, chunk]
    before_BTGAYI = torch.stack(before, dim=1)
    carried_BTQGAY = torch.einsum("btqgi,btgayi,btgaq->btqgay", queries_BTQGI, before_BTGAYI, passed_BTGAQ.exp())
    return y_BTQGAY + carried_BTQGAY, state_BGAYI


def _decays(passed_BTGAQ: Tensor) -> Tensor:
    """[B, T, G, A, Q, Q]: what is left at a position of what came in at another; 0 for what comes later."""
    between_BTGAQQ = passed_BTGAQ[..., :, None] - passed_BTGAQ[..., None, :]
    later_QQ = torch.ones(between_BTGAQQ.shape[-2:], dtype=torch.bool, device=passed_BTGAQ.device).triu(1)
    return between_BTGAQQ.masked_fill(later_QQ, float("-inf")).exp()


def _step(dt_BSA: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float]) -> Tensor:
    if bias is not None:
        dt_BSA = dt_BSA + bias
    return (F.softplus(dt_BSA) if softplus else dt_BSA).clamp(*limit)


def _chunks(part: Tensor, size: int) -> Tensor:
    """[B, S, ...] -> [B, T, Q, ...]. Zeros fill the last chunk up: they add nothing, and nothing decays over them."""
    padding = [0, 0] * (part.dim() - 2) + [0, -part.shape[1] % size]
    return F.pad(part, padding).unflatten(1, (-1, size))


def refuse_packed(seq_idx: Tensor | None) -> None:
    """The convolution in front of the scan has seen the other samples already."""
    if seq_idx is not None:
        raise InputError(
            "a scan without its convolution (use_mem_eff_path=False) cannot keep packed samples apart; legal is None"
        )


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in."""
    return torch.promote_types(dtype, torch.float32)
