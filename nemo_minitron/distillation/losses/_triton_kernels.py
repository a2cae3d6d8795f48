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
def kl_statistics(  # type: ignore[no-untyped-def]
    student, teacher, out, stride_s, stride_t, rows, width, scale, BLOCK: tl.constexpr
):
    """Row -> max s, max t, sum e^s, sum e^t, sum e^t (t - s), each shifted by its max: out [5, rows].

    s and t are the logits times scale, 1 / T.

    Online: what has been summed is scaled down, and the cross term shifted, whenever a block raises a maximum.
    """
    row = tl.program_id(0).to(tl.int64)
    # Finite, so that no difference of two of them is not a number; a row without columns keeps them and counts 0.
    max_s, max_t = -1e30, -1e30
    sum_s, sum_t, cross = 0.0, 0.0, 0.0
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
        apart = (t - top_t) - (s - top_s)
        # 0 times -1e30 before the first block is 0: nothing has been summed yet.
        cross = scale_t * (cross + sum_t * (down_t - down_s)) + tl.sum(exp_t * apart, 0)
        sum_t = scale_t * sum_t + tl.sum(exp_t, 0)
        sum_s = tl.exp(down_s) * sum_s + tl.sum(tl.where(inside, tl.exp(s - top_s), 0.0), 0)
        max_s, max_t = top_s, top_t
    tl.store(out + row, max_s)
    tl.store(out + rows + row, max_t)
    tl.store(out + 2 * rows + row, sum_s)
    tl.store(out + 3 * rows + row, sum_t)
    tl.store(out + 4 * rows + row, cross)


@triton.jit
def kl_gradient(  # type: ignore[no-untyped-def]
    out, student, teacher, whole, factors, stride_o, stride_s, stride_t, rows, width, scale, BLOCK: tl.constexpr
):
    """T (p_s - p_t) of one row and block of columns, times the row's factor where `factors` [rows] are given; `whole`
    [5, rows] as `kl_statistics`, of all shards; T is 1 / scale."""
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
