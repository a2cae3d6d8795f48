"""Triton's side of `_triton`: one program a row for the statistics, one a row and block for the gradient."""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of a program at a time, and the warps that share them. On an H200 (bf16, 8,192 x 128,256) the fastest of ten,
# and of the gradient's, which hardly differ, within 0.5 % of it.
STATISTICS, GRADIENT = (2048, 4), (8192, 16)


def launch(width: int, most: int, warps: int) -> dict[str, int]:
    """`most` columns at a time, or as many as a narrow shard has."""
    block = min(most, triton.next_power_of_2(max(width, 16)))
    return {"BLOCK": block, "num_warps": max(1, min(warps, block // 256))}


@triton.jit
def _curve(u):
    """h(u) = e^-u - 1 + u; near 0 by its series, where the difference would lose its digits."""
    series = u * u * (1 / 2 - u * (1 / 6 - u * (1 / 24 - u * (1 / 120 - u / 720))))
    return tl.where(tl.abs(u) < 0.25, series, tl.exp(-u) - 1.0 + u)


@triton.jit
def kl_statistics(  # type: ignore[no-untyped-def]
    student, teacher, out, stride_s, stride_t, rows, width, scale, BLOCK: tl.constexpr
):
    """Row -> max s, max t, sum e^s, sum e^t, each shifted by its max, and with u = t - s - c: sum e^t u, sum e^t h(u)
    (`_softmax`), c: out [7, rows]. The first of the last three is inf where the student alone excludes a token.

    s and t are the logits times scale, 1 / T.

    Online: what has been summed is scaled down, and c moved, whenever a block raises a maximum; each block has a c of
    its own, the mean of its t - s.
    """
    row = tl.program_id(0).to(tl.int64)
    # Finite, so that no difference of two of them is not a number; a row without columns keeps them and counts 0.
    max_s, max_t = -1e30, -1e30
    sum_s, sum_t, first, second, mean = 0.0, 0.0, 0.0, 0.0, 0.0
    endless = tl.zeros([BLOCK], tl.int32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        s = tl.load(student + row * stride_s + column, mask=inside, other=0.0).to(tl.float32) * scale
        t = tl.load(teacher + row * stride_t + column, mask=inside, other=0.0).to(tl.float32) * scale
        top_s = tl.maximum(max_s, tl.max(tl.where(inside, s, -1e30), 0))
        top_t = tl.maximum(max_t, tl.max(tl.where(inside, t, -1e30), 0))
        down_s, down_t = max_s - top_s, max_t - top_t
        scale_t = tl.exp(down_t)
        exp_t = tl.where(inside, tl.exp(t - top_t), 0.0)
        excluded = (s == float("-inf")) | (t == float("-inf"))
        alone = inside & (s == float("-inf")) & (t != float("-inf"))
        endless = endless | alone.to(tl.int32)
        apart = tl.where(inside & (excluded == 0), (t - top_t) - (s - top_s), 0.0)
        sum_s = tl.exp(down_s) * sum_s + tl.sum(tl.where(inside, tl.exp(s - top_s), 0.0), 0)
        here = tl.sum(exp_t, 0)
        own = tl.sum(exp_t * apart, 0) / tl.maximum(here, 1e-37)
        u = tl.where(exp_t > 0.0, apart - own, 0.0)
        before, at = sum_t * scale_t, mean + (down_t - down_s)
        sum_t = before + here
        mean = (before * at + here * own) / tl.maximum(sum_t, 1e-37)
        # 0 before the first block, where `at` is 1e30: nothing has been summed yet.
        d, e = tl.where(before > 0.0, at - mean, 0.0), tl.where(here > 0.0, own - mean, 0.0)
        of_d, of_e = _curve(d), _curve(e)
        # The block's own sum of e^t u is 0 but for its rounding, which counts in the second order.
        second = scale_t * (second * (of_d - d + 1.0) - first * (of_d - d)) + before * of_d
        second += tl.sum(exp_t * _curve(u), 0) * (of_e - e + 1.0) + here * of_e
        first = scale_t * first + before * d + here * e
        max_s, max_t = top_s, top_t
    tl.store(out + row, max_s)
    tl.store(out + rows + row, max_t)
    tl.store(out + 2 * rows + row, sum_s)
    tl.store(out + 3 * rows + row, sum_t)
    tl.store(out + 4 * rows + row, tl.where(tl.max(endless, 0) > 0, float("inf"), first))
    tl.store(out + 5 * rows + row, second)
    tl.store(out + 6 * rows + row, mean)


@triton.jit
def kl_gradient(  # type: ignore[no-untyped-def]
    out, student, teacher, whole, factors, stride_o, stride_s, stride_t, rows, width, scale, BLOCK: tl.constexpr
):
    """T (p_s - p_t) of one row and block of columns, times the row's factor where `factors` [rows] are given; `whole`
    [6, rows] is `_softmax.Whole`; T is 1 / scale."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    s = tl.load(student + row * stride_s + column, mask=inside, other=0.0).to(tl.float32) * scale
    t = tl.load(teacher + row * stride_t + column, mask=inside, other=0.0).to(tl.float32) * scale
    times = 1.0 / scale
    if factors is not None:
        times *= tl.load(factors + row)
    times_s, times_t = times / tl.load(whole + 2 * rows + row), times / tl.load(whole + 3 * rows + row)
    found = tl.exp(s - tl.load(whole + row)) * times_s - tl.exp(t - tl.load(whole + rows + row)) * times_t
    tl.store(out + row * stride_o + column, found.to(out.dtype.element_ty), mask=inside)
