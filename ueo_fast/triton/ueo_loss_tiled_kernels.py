"""The loss of rows that are too long to be held: tiles of columns. Steps: docs/math.md.

The first pass over a group of ROWS rows is an online softmax, the second reads the rows again
while the L2 still has them. Otherwise as in ueo_loss_kernels.py.

Each thread keeps a maximum and sums of its own until the end of a row: nothing in the loops over
tiles waits for other threads.
"""

# Triton writes compile-time parameters in capitals, and a launch gives parameters their types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from ueo_fast.triton.ueo_loss_math import (
    LN2,
    LOG2E,
    clamp_exponent,
    constant,
    join,
    largest_weights,
    load_weights,
    log_in_step_8,
    saved_parts,
    step_8_bracket,
    step_8_factors,
    store_chunk_sums,
    store_row_stats,
)


@triton.jit
def load_tile(logits, row, row_stride, column, columns):
    """Columns of rows, (ROWS, COLUMNS); -inf, a masked class, beyond the last column."""
    source = logits + row[:, None] * row_stride + column[None, :]
    return tl.load(source, mask=column[None, :] < columns, other=float("-inf"))


@triton.jit
def by_thread(tile, SLOT: tl.constexpr, VECTOR: tl.constexpr):
    """A tile with an axis of its own for what one thread holds of a row.

    Loads of vectors give a thread adjacent columns, axis 2; others go to adjacent threads, axis 1.
    """
    rows: tl.constexpr = tile.shape[0]
    lanes: tl.constexpr = tile.shape[1] // SLOT
    return tl.reshape(tile, (rows, lanes, SLOT) if VECTOR else (rows, SLOT, lanes))


@triton.jit
def online_softmax(
    logits,  # (B, C), strides (row_stride, 1)
    row,  # (ROWS,) int64
    columns,  # C
    row_stride,  # in elements
    scale,  # confidence_scale * log2(e)
    dtype: tl.constexpr,  # of the arithmetic
    ROWS: tl.constexpr,  # of a tile
    COLUMNS: tl.constexpr,  # of a tile
    SLOT: tl.constexpr,  # of them in one thread
    VECTOR: tl.constexpr,  # whether these are adjacent
    SCALED: tl.constexpr,  # whether to sum 2^(scale * (z - max))
):
    """Step 1 of rows: max, sum of e = exp(z - max), of e log2(e), and of 2^(scale (z - max))."""
    axis: tl.constexpr = 2 if VECTOR else 1
    lanes: tl.constexpr = COLUMNS // SLOT
    # Finite: the first tiles of a row may be masked as a whole.
    lowest = constant(dtype, -1.7976931348623157e308, -3.4028234663852886e38)
    m = tl.full((ROWS, lanes), lowest, dtype)
    s = tl.zeros((ROWS, lanes), dtype)
    dot = tl.zeros((ROWS, lanes), dtype)
    scaled_sum = tl.zeros((ROWS, lanes), dtype)
    column = tl.arange(0, COLUMNS)
    following = load_tile(logits, row, row_stride, column, columns)
    for tile in range(0, tl.cdiv(columns, COLUMNS)):
        z = by_thread(following, SLOT, VECTOR).to(dtype)
        # Under way while this tile is computed; beyond the last one nothing is read.
        column = (tile + 1) * COLUMNS + tl.arange(0, COLUMNS)
        following = load_tile(logits, row, row_stride, column, columns)
        next_m = tl.maximum(m, tl.max(z, axis))
        z -= tl.expand_dims(next_m, axis)
        t = clamp_exponent(z * LOG2E)
        e = tl.exp2(t)
        # A larger maximum makes every exponent so far smaller by `shift`.
        shift = clamp_exponent((m - next_m) * LOG2E)
        factor = tl.exp2(shift)
        dot = factor * (dot + shift * s) + tl.sum(e * t, axis)
        s = factor * s + tl.sum(e, axis)
        if SCALED:
            factor = tl.exp2(clamp_exponent((m - next_m) * scale))
            scaled_sum = factor * scaled_sum + tl.sum(tl.exp2(clamp_exponent(z * scale)), axis)
        m = next_m
    row_m = tl.max(m, 1)
    m -= row_m[:, None]
    shift = clamp_exponent(m * LOG2E)
    factor = tl.exp2(shift)
    dot = tl.sum(factor * (dot + shift * s), 1)
    if SCALED:
        scaled_sum *= tl.exp2(clamp_exponent(m * scale))
    return row_m, tl.sum(factor * s, 1), dot, tl.sum(scaled_sum, 1)


@triton.jit
def forward_tiled_kernel(
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
    COLUMNS: tl.constexpr,  # of a tile
    SLOT: tl.constexpr,  # of them in one thread
    VECTOR: tl.constexpr,  # whether these are adjacent
    SCALED: tl.constexpr,  # whether the confidence is internal, at a scale other than 1
    EPS: tl.constexpr,  # whether eps is not 0
    WEIGHTS: tl.constexpr,  # given weights looked at together
):
    """Steps 1 to 5 of one chunk of rows; column sums are kept in memory, which means in the L2."""
    axis: tl.constexpr = 2 if VECTOR else 1
    dtype: tl.constexpr = row_stats.dtype.element_ty
    scale = join(scale_high, scale_low, dtype)
    eps = join(eps_high, eps_low, dtype)
    chunk = tl.program_id(0).to(tl.int64)
    if chunk == 0:
        tl.store(counter, 0)
    begin = chunk * chunk_rows
    end = tl.minimum(begin + chunk_rows, rows)

    scale_w = tl.full((), 1.0, dtype)
    scale_v = tl.full((), 1.0, dtype)
    if confidence is not None or marginal_weights is not None:
        largest_w, scale_v = largest_weights(confidence, marginal_weights, begin, end, WEIGHTS)
        if confidence is not None:
            scale_w = largest_w
    # In double: what a float loses, equal terms lose the same way, and the two entropies cancel.
    sum_w = tl.zeros((ROWS,), tl.float64)
    sum_v = tl.zeros((ROWS,), tl.float64)
    sum_h = tl.zeros((ROWS,), tl.float64)
    for step in range(0, tl.cdiv(end - begin, ROWS)):
        row = begin + step * ROWS + tl.arange(0, ROWS)
        valid = row < end
        row = tl.minimum(row, end - 1)
        m, s, dot, scaled_sum = online_softmax(
            logits, row, columns, row_stride, scale, dtype, ROWS, COLUMNS, SLOT, VECTOR, SCALED
        )
        inverse_sum = 1.0 / s
        w = inverse_sum  # step 2
        v = s
        if SCALED:
            w = 1.0 / scaled_sum
            v = scaled_sum
        if confidence is not None or marginal_weights is not None:
            given_w, given_v = load_weights(confidence, marginal_weights, row)
            if confidence is not None:
                w = given_w
            v = given_v
        relative_v = tl.where(valid, v / scale_v, 0.0)
        entropy_sum = tl.zeros((ROWS, COLUMNS // SLOT), dtype)
        for tile in range(0, tl.cdiv(columns, COLUMNS)):
            column = tile * COLUMNS + tl.arange(0, COLUMNS)
            z = load_tile(logits, row, row_stride, column, columns).to(dtype)
            p = tl.exp2(clamp_exponent((z - m[:, None]) * LOG2E)) * inverse_sum[:, None]
            if EPS:  # step 4
                entropy_sum -= tl.sum(by_thread(p * tl.log(p + eps), SLOT, VECTOR), axis)
            sums = column_sums + chunk * columns + column  # step 5
            inside = column < columns
            q = tl.load(sums, mask=inside & (step > 0), other=0.0)
            tl.store(sums, q + tl.sum(p * relative_v[:, None], 0), mask=inside)
        tl.debug_barrier()  # the next group of rows reads what other threads may have stored
        entropy = tl.sum(entropy_sum, 1)
        if not EPS:
            entropy = tl.log(s) - LN2 * (dot * inverse_sum)
        store_row_stats(row_stats, row, valid, m, s, entropy, w, v)
        w = tl.where(valid, w / scale_w, 0.0)
        sum_w += w
        sum_v += relative_v
        sum_h += w.to(tl.float64) * entropy
    store_chunk_sums(chunk_sums, chunk, scale_w, sum_w, sum_h, scale_v, sum_v)


@triton.jit
def bracket_of_tile(
    z, m, inverse_sum, of_log_p, of_log_q, marginal, column, columns, eps, EPS: tl.constexpr
):
    """e = exp(z - max) and the bracket of step 8 for a tile; m to of_log_q: (ROWS,)."""
    # The 0 is one that the compiler does not see. It would read the marginal, which is aligned, in
    # vectors also where the logits are not, and swap what was read between threads.
    source = marginal + tl.minimum(columns, 0) + column
    q = tl.load(source, mask=column < columns, other=1.0)
    log_q = log_in_step_8(q, eps, EPS)[None, :]
    t = clamp_exponent((z - m[:, None]) * LOG2E)
    e = tl.exp2(t)
    bracket = step_8_bracket(
        e, t, inverse_sum[:, None], log_q, of_log_p[:, None], of_log_q[:, None], eps, EPS
    )
    return e, bracket


@triton.jit
def backward_tiled_kernel(
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
    COLUMNS: tl.constexpr,  # of a tile
    SLOT: tl.constexpr,  # of them in one thread
    VECTOR: tl.constexpr,  # whether these are adjacent
    EPS: tl.constexpr,  # whether eps is not 0
):
    """Step 8 of one chunk of rows, in reverse: the L2 holds what forward read last."""
    axis: tl.constexpr = 2 if VECTOR else 1
    dtype: tl.constexpr = saved.dtype.element_ty
    row_stats, marginal, summary = saved_parts(saved, rows, columns)
    trade_off = join(trade_off_high, trade_off_low, dtype)
    eps = join(eps_high, eps_low, dtype)
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * chunk_rows
    end = tl.minimum(begin + chunk_rows, rows)
    steps = tl.cdiv(end - begin, ROWS)
    tiles = tl.cdiv(columns, COLUMNS)
    for step in range(0, steps):
        row = begin + (steps - 1 - step) * ROWS + tl.arange(0, ROWS)
        valid = row < end
        row = tl.minimum(row, end - 1)
        m, inverse_sum, of_log_p, of_log_q = step_8_factors(
            row_stats, summary, grad_loss, row, rows, trade_off, EPS
        )
        mean_sum = tl.zeros((ROWS, COLUMNS // SLOT), dtype)
        for tile in range(0, tiles):
            column = tile * COLUMNS + tl.arange(0, COLUMNS)
            z = load_tile(logits, row, row_stride, column, columns).to(dtype)
            e, bracket = bracket_of_tile(
                z, m, inverse_sum, of_log_p, of_log_q, marginal, column, columns, eps, EPS
            )
            mean_sum += tl.sum(by_thread(e * bracket, SLOT, VECTOR), axis)
        mean = tl.sum(mean_sum, 1) * inverse_sum
        for tile in range(0, tiles):
            column = tile * COLUMNS + tl.arange(0, COLUMNS)
            z = load_tile(logits, row, row_stride, column, columns).to(dtype)
            e, bracket = bracket_of_tile(
                z, m, inverse_sum, of_log_p, of_log_q, marginal, column, columns, eps, EPS
            )
            gradient = e * (bracket - mean[:, None])
            target = grad + row[:, None] * columns + column[None, :]
            mask = valid[:, None] & (column[None, :] < columns)
            tl.store(target, gradient.to(grad.dtype.element_ty), mask=mask)


@triton.jit
def max_softmax_tiled_kernel(
    logits,  # (B, C), strides (row_stride, 1)
    out,  # out (B,)
    rows,  # B
    columns,  # C
    row_stride,  # in elements
    scale_high,  # scale * log2(e), high and low part
    scale_low,
    ROWS: tl.constexpr,  # of a tile, one program each
    COLUMNS: tl.constexpr,  # of a tile
    SLOT: tl.constexpr,  # of them in one thread
    VECTOR: tl.constexpr,  # whether these are adjacent
):
    """Step 2 without the rest."""
    dtype: tl.constexpr = out.dtype.element_ty
    scale = join(scale_high, scale_low, dtype)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    row = tl.minimum(row, rows - 1)
    _, _, _, scaled_sum = online_softmax(
        logits, row, columns, row_stride, scale, dtype, ROWS, COLUMNS, SLOT, VECTOR, True
    )
    tl.store(out + row, 1.0 / scaled_sum, mask=valid)
