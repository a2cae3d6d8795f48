"""Triton's side of `_triton`: one program a token for the statistics, one a token and block for the gradient.

Shapes (docs/shapes.md): N tokens, W columns of the vocabulary on this rank, M statistics of a token, I the columns of a
block. The logits' columns lie one after another; the distance of two rows is their stride.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Columns that a program takes at a time, and the warps that share them. On an H200 (bf16, 8,192 x 128,256) the first
# pair is the fastest of ten for the statistics. For the gradient the ten hardly differ: the second pair is within 0.5 %
# of the fastest.
STATISTICS, GRADIENT = (2048, 4), (8192, 16)


def launch(width: int, most: int, warps: int) -> dict[str, int]:
    """Options of a kernel's launch: `most` columns at a time, or fewer if the shard is narrower."""
    block = min(most, triton.next_power_of_2(max(width, 16)))
    return {"BLOCK": block, "num_warps": max(1, min(warps, block // 256))}


@triton.jit
def _curve(u):
    """h(u) = e^-u - 1 + u. Near 0 by its series, because there the difference would lose its digits."""
    series = u * u * (1 / 2 - u * (1 / 6 - u * (1 / 24 - u * (1 / 120 - u / 720))))
    return tl.where(tl.abs(u) < 0.25, series, tl.exp(-u) - 1.0 + u)


@triton.jit
def kl_statistics(  # type: ignore[no-untyped-def]
    student_NW, teacher_NW, out_MN, stride_s, stride_t, tokens, width, scale, BLOCK: tl.constexpr
):
    """One token -> max s, max t; sum e^s, sum e^t, each shifted by its max; sum e^t u, sum e^t h(u) with u = t - s - c;
    and c (`_softmax`): out_MN [7, N]. The sum of e^t u is inf if only the student excludes a token.

    s and t are the logits times scale, 1 / T.

    It is an online algorithm: whenever a block raises a maximum, the sums so far are scaled down and c is moved. Each
    block has a c of its own, the mean of its t - s.
    """
    token = tl.program_id(0).to(tl.int64)
    # A finite start, because the difference of two infinities is NaN. A token without columns keeps it and counts 0.
    max_s, max_t = -1e30, -1e30
    sum_s, sum_t, sum_u, sum_h, mean = 0.0, 0.0, 0.0, 0.0, 0.0
    infinite_I = tl.zeros([BLOCK], tl.int32)
    for start in range(0, width, BLOCK):
        column_I = start + tl.arange(0, BLOCK)
        inside_I = column_I < width
        s_I = tl.load(student_NW + token * stride_s + column_I, mask=inside_I, other=0.0).to(tl.float32) * scale
        t_I = tl.load(teacher_NW + token * stride_t + column_I, mask=inside_I, other=0.0).to(tl.float32) * scale
        top_s = tl.maximum(max_s, tl.max(tl.where(inside_I, s_I, -1e30), 0))
        top_t = tl.maximum(max_t, tl.max(tl.where(inside_I, t_I, -1e30), 0))
        down_s, down_t = max_s - top_s, max_t - top_t
        scale_t = tl.exp(down_t)
        exp_t_I = tl.where(inside_I, tl.exp(t_I - top_t), 0.0)
        excluded_I = (s_I == float("-inf")) | (t_I == float("-inf"))
        alone_I = inside_I & (s_I == float("-inf")) & (t_I != float("-inf"))
        infinite_I = infinite_I | alone_I.to(tl.int32)
        difference_I = tl.where(inside_I & (excluded_I == 0), (t_I - top_t) - (s_I - top_s), 0.0)
        sum_s = tl.exp(down_s) * sum_s + tl.sum(tl.where(inside_I, tl.exp(s_I - top_s), 0.0), 0)
        block_sum_t = tl.sum(exp_t_I, 0)
        block_mean = tl.sum(exp_t_I * difference_I, 0) / tl.maximum(block_sum_t, 1e-37)
        u_I = tl.where(exp_t_I > 0.0, difference_I - block_mean, 0.0)
        before, mean_before = sum_t * scale_t, mean + (down_t - down_s)
        sum_t = before + block_sum_t
        mean = (before * mean_before + block_sum_t * block_mean) / tl.maximum(sum_t, 1e-37)
        # 0 in front of the first block, where mean_before is 1e30: nothing has been summed yet.
        d = tl.where(before > 0.0, mean_before - mean, 0.0)
        e = tl.where(block_sum_t > 0.0, block_mean - mean, 0.0)
        h_d, h_e = _curve(d), _curve(e)
        # The block's own sum of e^t u is 0 except for its rounding, which counts only in the second order.
        sum_h = scale_t * (sum_h * (h_d - d + 1.0) - sum_u * (h_d - d)) + before * h_d
        sum_h += tl.sum(exp_t_I * _curve(u_I), 0) * (h_e - e + 1.0) + block_sum_t * h_e
        sum_u = scale_t * sum_u + before * d + block_sum_t * e
        max_s, max_t = top_s, top_t
    tl.store(out_MN + token, max_s)
    tl.store(out_MN + tokens + token, max_t)
    tl.store(out_MN + 2 * tokens + token, sum_s)
    tl.store(out_MN + 3 * tokens + token, sum_t)
    tl.store(out_MN + 4 * tokens + token, tl.where(tl.max(infinite_I, 0) > 0, float("inf"), sum_u))
    tl.store(out_MN + 5 * tokens + token, sum_h)
    tl.store(out_MN + 6 * tokens + token, mean)


@triton.jit
def kl_gradient(  # type: ignore[no-untyped-def]
    out_NW, student_NW, teacher_NW, joined_MN, factors_N, stride_o, stride_s, stride_t, tokens, width, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """T (p_s - p_t) of one token and block of columns, times the token's factor if there are factors.

    joined_MN [6, N] is `_softmax.Joined`; scale is 1 / T.
    """
    token = tl.program_id(0).to(tl.int64)
    column_I = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_I = column_I < width
    s_I = tl.load(student_NW + token * stride_s + column_I, mask=inside_I, other=0.0).to(tl.float32) * scale
    t_I = tl.load(teacher_NW + token * stride_t + column_I, mask=inside_I, other=0.0).to(tl.float32) * scale
    factor = 1.0 / scale
    if factors_N is not None:
        factor *= tl.load(factors_N + token)
    max_s, max_t = tl.load(joined_MN + token), tl.load(joined_MN + tokens + token)
    factor_s = factor / tl.load(joined_MN + 2 * tokens + token)
    factor_t = factor / tl.load(joined_MN + 3 * tokens + token)
    gradient_I = tl.exp(s_I - max_s) * factor_s - tl.exp(t_I - max_t) * factor_t
    tl.store(out_NW + token * stride_o + column_I, gradient_I.to(out_NW.dtype.element_ty), mask=inside_I)
