"""Triton's side of `_triton`: one program a row for the statistics, one a row and block for the gradient."""

from __future__ import annotations

import triton
import triton.language as tl


def block(width: int) -> int:
    """Columns of a program at a time."""
    return min(4096, triton.next_power_of_2(max(width, 16)))


@triton.jit
def kl_statistics(  # type: ignore[no-untyped-def]
    student, teacher, out, stride_s, stride_t, rows, width, temperature, BLOCK: tl.constexpr
):
    """Row -> max s, max t, sum e^s, sum e^t, sum e^t (t - s), s and t over T, each shifted by its max: out [5, rows].

    Online: what has been summed is scaled down, and the cross term shifted, whenever a block raises a maximum.
    """
    row = tl.program_id(0).to(tl.int64)
    # Finite, so that no difference of two of them is not a number; a row without columns keeps them and counts 0.
    max_s, max_t = -1e30, -1e30
    sum_s, sum_t, cross = 0.0, 0.0, 0.0
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        s = tl.load(student + row * stride_s + column, mask=inside, other=0.0).to(tl.float32) / temperature
        t = tl.load(teacher + row * stride_t + column, mask=inside, other=0.0).to(tl.float32) / temperature
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
    out, student, teacher, whole, stride_o, stride_s, stride_t, rows, width, temperature, BLOCK: tl.constexpr
):
    """T (p_s - p_t) of one row and block of columns; `whole` [5, rows] as `kl_statistics`, of all shards."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    s = tl.load(student + row * stride_s + column, mask=inside, other=0.0).to(tl.float32) / temperature
    t = tl.load(teacher + row * stride_t + column, mask=inside, other=0.0).to(tl.float32) / temperature
    p_s = tl.exp(s - tl.load(whole + row)) / tl.load(whole + 2 * rows + row)
    p_t = tl.exp(t - tl.load(whole + rows + row)) / tl.load(whole + 3 * rows + row)
    tl.store(out + row * stride_o + column, (temperature * (p_s - p_t)).to(out.dtype.element_ty), mask=inside)
