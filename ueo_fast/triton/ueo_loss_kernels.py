"""The loss of rows that are held in registers, and the sum over chunks. Steps: docs/math.md.

A program owns a chunk of rows and walks it in tiles of ROWS x COLUMNS; columns beyond the last
read as -inf, a masked class. A row beyond the last reads as the last with weight 0.
"""

# Triton writes compile-time parameters in capitals, and a launch gives parameters their types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from ueo_fast.triton.ueo_loss_math import (
    CHUNK_CONFIDENCE,
    CHUNK_CONFIDENCE_SCALE,
    CHUNK_ENTROPY,
    CHUNK_MARGINAL_SCALE,
    CHUNK_MARGINAL_WEIGHT,
    CHUNK_SUMS,
    CONDITIONAL_ENTROPY,
    LN2,
    LOG2E,
    MARGINAL_ENTROPY,
    MEAN_CONFIDENCE,
    MEAN_ROW_CONFIDENCE,
    MEAN_ROW_MARGINAL_WEIGHT,
    clamp_exponent,
    join,
    largest_weights,
    load_weights,
    log_in_step_8,
    safe_log,
    saved_parts,
    step_8_bracket,
    step_8_factors,
    store_chunk_sums,
    store_row_stats,
)


@triton.jit
def forward_kernel(
    logits,  # (B, C), strides (row_stride, 1)
    confidence,  # (B,) w, or None
    marginal_weights,  # (B,) v, or None
    row_stats,  # out (B, 5)
    column_sums,  # out (chunks, C): sum_i v_i / scale * p_ic
    chunk_sums,  # out (chunks, 5)
    counter,  # out (1,) int32: 0, for finish_kernel
    rows,  # B
    columns,  # C
    row_stride,  # in elements
    chunk_rows,  # rows per program, a multiple of ROWS
    scale_high,  # confidence_scale * log2(e), high and low part
    scale_low,
    eps_high,  # high and low part
    eps_low,
    ROWS: tl.constexpr,  # of a tile
    COLUMNS: tl.constexpr,  # of a tile, at least C
    SCALED: tl.constexpr,  # whether the confidence is internal, at a scale other than 1
    EPS: tl.constexpr,  # whether eps is not 0
    WEIGHTS: tl.constexpr,  # given weights looked at together
):
    """Steps 1 to 5 of one chunk of rows."""
    dtype: tl.constexpr = row_stats.dtype.element_ty
    scale = join(scale_high, scale_low, dtype)
    eps = join(eps_high, eps_low, dtype)
    chunk = tl.program_id(0).to(tl.int64)
    if chunk == 0:
        tl.store(counter, 0)
    begin = chunk * chunk_rows
    end = tl.minimum(begin + chunk_rows, rows)
    column = tl.arange(0, COLUMNS)
    inside = column < columns

    scale_w = tl.full((), 1.0, dtype)
    scale_v = tl.full((), 1.0, dtype)
    if confidence is not None or marginal_weights is not None:
        largest_w, scale_v = largest_weights(confidence, marginal_weights, begin, end, WEIGHTS)
        if confidence is not None:
            scale_w = largest_w
    q = tl.zeros((ROWS, COLUMNS), dtype)
    # In double: what a float loses, equal terms lose the same way, and the two entropies cancel.
    sum_w = tl.zeros((ROWS,), tl.float64)
    sum_v = tl.zeros((ROWS,), tl.float64)
    sum_h = tl.zeros((ROWS,), tl.float64)
    for step in range(0, tl.cdiv(end - begin, ROWS)):
        row = begin + step * ROWS + tl.arange(0, ROWS)
        valid = row < end
        row = tl.minimum(row, end - 1)
        source = logits + row[:, None] * row_stride + column[None, :]
        z = tl.load(source, mask=inside[None, :], other=float("-inf")).to(dtype)
        # Step 1. A NaN that max ignores, and inf - inf, come out of the sum.
        m = tl.max(z, 1)
        z -= m[:, None]
        t = clamp_exponent(z * LOG2E)
        e = tl.exp2(t)
        s = tl.sum(e, 1)
        inverse_sum = 1.0 / s
        w = inverse_sum  # step 2
        v = s
        if SCALED:
            v = tl.sum(tl.exp2(clamp_exponent(z * scale)), 1)
            w = 1.0 / v
        if confidence is not None or marginal_weights is not None:
            given_w, given_v = load_weights(confidence, marginal_weights, row)
            if confidence is not None:
                w = given_w
            v = given_v
        if EPS:  # step 4
            p = e * inverse_sum[:, None]
            entropy = -tl.sum(p * tl.log(p + eps), 1)
        else:
            entropy = tl.log(s) - LN2 * (tl.sum(e * t, 1) * inverse_sum)
        store_row_stats(row_stats, row, valid, m, s, entropy, w, v)
        w = tl.where(valid, w / scale_w, 0.0)
        v = tl.where(valid, v / scale_v, 0.0)
        sum_w += w
        sum_v += v
        sum_h += w.to(tl.float64) * entropy
        q += e * (v * inverse_sum)[:, None]  # step 5
    tl.store(column_sums + chunk * columns + column, tl.sum(q, 0), mask=inside)
    store_chunk_sums(chunk_sums, chunk, scale_w, sum_w, sum_h, scale_v, sum_v)


@triton.jit
def finish_kernel(
    column_sums,  # (chunks, C)
    chunk_sums,  # (chunks, 5)
    entropies,  # scratch (programs,): -sum q log q of a tile of columns
    counter,  # (1,) int32, 0: how many programs have written their entropy
    saved,  # out: marginal and summary, after the row statistics that are there
    loss,  # out ()
    rows,  # B
    columns,  # C
    chunks,
    trade_off_high,  # high and low part
    trade_off_low,
    eps_high,  # high and low part
    eps_low,
    CHUNKS: tl.constexpr,  # of a tile
    COLUMNS: tl.constexpr,  # of a tile, one program each
    EPS: tl.constexpr,  # whether eps is not 0
):
    """Steps 3, 5, 6 and 7: sums over chunks in double and in a fixed order.

    The program that comes last adds up the entropies of all; which one that is changes nothing.
    """
    dtype: tl.constexpr = saved.dtype.element_ty
    _, marginal, summary = saved_parts(saved, rows, columns)
    tile = tl.program_id(0).to(tl.int64)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    q_sums = tl.zeros((CHUNKS, COLUMNS), tl.float64)
    w_sums = tl.zeros((CHUNKS,), tl.float64)
    h_sums = tl.zeros((CHUNKS,), tl.float64)
    v_sums = tl.zeros((CHUNKS,), tl.float64)
    for step in range(0, tl.cdiv(chunks, CHUNKS)):
        chunk = step * CHUNKS + tl.arange(0, CHUNKS).to(tl.int64)
        there = chunk < chunks
        source = column_sums + chunk[:, None] * columns + column[None, :]
        q = tl.load(source, mask=there[:, None] & inside[None, :], other=0.0)
        sums = chunk_sums + chunk * CHUNK_SUMS
        scale_w = tl.load(sums + CHUNK_CONFIDENCE_SCALE, mask=there, other=0.0).to(tl.float64)
        scale_v = tl.load(sums + CHUNK_MARGINAL_SCALE, mask=there, other=0.0).to(tl.float64)
        q_sums += scale_v[:, None] * q
        w_sums += scale_w * tl.load(sums + CHUNK_CONFIDENCE, mask=there, other=0.0)
        h_sums += scale_w * tl.load(sums + CHUNK_ENTROPY, mask=there, other=0.0)
        v_sums += scale_v * tl.load(sums + CHUNK_MARGINAL_WEIGHT, mask=there, other=0.0)
    sum_w = tl.sum(w_sums, 0)
    sum_h = tl.sum(h_sums, 0)
    sum_v = tl.sum(v_sums, 0)
    q = (tl.sum(q_sums, 0) / sum_v).to(dtype)
    tl.store(marginal + column, q, mask=inside)
    log_q = tl.log(q + join(eps_high, eps_low, dtype)) if EPS else safe_log(q)
    tl.store(entropies + tile, -tl.sum(tl.where(inside, q * log_q, 0.0), 0))
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tiles = tl.num_programs(0)
        parts = tl.zeros((CHUNKS,), tl.float64)
        for step in range(0, tl.cdiv(tiles, CHUNKS)):
            other_tile = step * CHUNKS + tl.arange(0, CHUNKS)
            # Past the L1, which does not see what other SMs write.
            parts += tl.load(
                entropies + other_tile, mask=other_tile < tiles, other=0.0, cache_modifier=".cg"
            )
        conditional = sum_h / sum_w
        entropy = tl.sum(parts, 0)
        tl.store(loss, conditional - join(trade_off_high, trade_off_low, tl.float64) * entropy)
        tl.store(summary + CONDITIONAL_ENTROPY, conditional)
        tl.store(summary + MARGINAL_ENTROPY, entropy)
        tl.store(summary + MEAN_CONFIDENCE, sum_w / rows)
        tl.store(summary + MEAN_ROW_CONFIDENCE, sum_w / rows)
        tl.store(summary + MEAN_ROW_MARGINAL_WEIGHT, sum_v / rows)


@triton.jit
def backward_kernel(
    grad_loss,  # (), or None for 1
    logits,  # (B, C), strides (row_stride, 1)
    saved,  # what forward kept
    grad,  # out (B, C), contiguous
    rows,  # B
    columns,  # C
    row_stride,  # in elements
    chunk_rows,  # rows per program, a multiple of ROWS
    trade_off_high,  # high and low part
    trade_off_low,
    eps_high,  # high and low part
    eps_low,
    ROWS: tl.constexpr,  # of a tile
    COLUMNS: tl.constexpr,  # of a tile, at least C
    EPS: tl.constexpr,  # whether eps is not 0
):
    """Step 8 of one chunk of rows, in reverse: the L2 holds what forward read last."""
    dtype: tl.constexpr = saved.dtype.element_ty
    row_stats, marginal, summary = saved_parts(saved, rows, columns)
    trade_off = join(trade_off_high, trade_off_low, dtype)
    eps = join(eps_high, eps_low, dtype)
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * chunk_rows
    end = tl.minimum(begin + chunk_rows, rows)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    q = tl.load(marginal + column, mask=inside, other=1.0)
    log_q = log_in_step_8(q, eps, EPS)[None, :]
    steps = tl.cdiv(end - begin, ROWS)
    for step in range(0, steps):
        row = begin + (steps - 1 - step) * ROWS + tl.arange(0, ROWS)
        valid = row < end
        row = tl.minimum(row, end - 1)
        source = logits + row[:, None] * row_stride + column[None, :]
        z = tl.load(source, mask=inside[None, :], other=float("-inf")).to(dtype)
        m, inverse_sum, of_log_p, of_log_q = step_8_factors(
            row_stats, summary, grad_loss, row, rows, trade_off, EPS
        )
        t = clamp_exponent((z - m[:, None]) * LOG2E)
        e = tl.exp2(t)
        bracket = step_8_bracket(
            e, t, inverse_sum[:, None], log_q, of_log_p[:, None], of_log_q[:, None], eps, EPS
        )
        mean = tl.sum(e * bracket, 1) * inverse_sum
        gradient = e * (bracket - mean[:, None])
        target = grad + row[:, None] * columns + column[None, :]
        tl.store(target, gradient.to(grad.dtype.element_ty), mask=valid[:, None] & inside[None, :])


@triton.jit
def max_softmax_kernel(
    logits,  # (B, C), strides (row_stride, 1)
    out,  # out (B,)
    rows,  # B
    columns,  # C
    row_stride,  # in elements
    scale_high,  # scale * log2(e), high and low part
    scale_low,
    ROWS: tl.constexpr,  # of a tile, one program each
    COLUMNS: tl.constexpr,  # of a tile, at least C
):
    """Step 2 without the rest."""
    dtype: tl.constexpr = out.dtype.element_ty
    scale = join(scale_high, scale_low, dtype)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    row = tl.minimum(row, rows - 1)
    column = tl.arange(0, COLUMNS)
    source = logits + row[:, None] * row_stride + column[None, :]
    z = tl.load(source, mask=column[None, :] < columns, other=float("-inf")).to(dtype)
    t = clamp_exponent((z - tl.max(z, 1)[:, None]) * scale)
    tl.store(out + row, 1.0 / tl.sum(tl.exp2(t), 1), mask=valid)
