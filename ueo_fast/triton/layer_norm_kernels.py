"""Layer normalisation of rows that are held in registers, and of longer ones by tiles of columns.

Statistics take two passes: the mean, then the squares around it. What the mean leaves over has a
mean too, of what the first sum lost, and corrects it: an offset of the row costs no digits.
"""

# Triton writes compile-time parameters in capitals, and a launch gives parameters their types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from ueo_fast.triton.ueo_loss_math import join


@triton.jit
def load_tile(source, row, row_stride, column, columns, dtype: tl.constexpr):
    """Columns of rows in the compute type, 0 beyond the last column. ``row`` (n,) int64."""
    pointer = source + row[:, None] * row_stride + column[None, :]
    return tl.load(pointer, mask=column[None, :] < columns, other=0.0).to(dtype)


@triton.jit
def store_tile(target, row, valid, column, columns, value):
    """To a contiguous (rows, columns) matrix, rounded once."""
    pointer = target + row[:, None] * columns + column[None, :]
    mask = valid[:, None] & (column[None, :] < columns)
    tl.store(pointer, value.to(target.dtype.element_ty), mask=mask)


@triton.jit
def modulated(normal, weight, bias, column, columns):
    """normal * weight + bias, either of which may be None."""
    if weight is not None:
        normal *= tl.load(weight + column, mask=column < columns, other=0.0)[None, :]
    if bias is not None:
        normal += tl.load(bias + column, mask=column < columns, other=0.0)[None, :]
    return normal


@triton.jit
def forward_kernel(
    x,  # (rows, columns), strides (row_stride, 1)
    weight,  # (columns,) in the compute dtype, or None
    bias,  # (columns,), or None
    out,  # out (rows, columns), contiguous
    mean,  # out (rows,) in the compute dtype
    rstd,  # out (rows,)
    rows,
    columns,
    row_stride,  # in elements
    eps_high,  # high and low part
    eps_low,
    ROWS: tl.constexpr,  # of a tile, one program each
    COLUMNS: tl.constexpr,  # of a tile, at least columns
):
    """One tile of whole rows."""
    dtype: tl.constexpr = mean.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    row = tl.minimum(row, rows - 1)
    column = tl.arange(0, COLUMNS)
    inside = (column < columns)[None, :]
    z = load_tile(x, row, row_stride, column, columns, dtype)
    m = tl.sum(z, 1) / columns
    m += tl.sum(tl.where(inside, z - m[:, None], 0.0), 1) / columns
    z = tl.where(inside, z - m[:, None], 0.0)
    r = tl.rsqrt(tl.sum(z * z, 1) / columns + join(eps_high, eps_low, dtype))
    tl.store(mean + row, m, mask=valid)
    tl.store(rstd + row, r, mask=valid)
    y = modulated(z * r[:, None], weight, bias, column, columns)
    store_tile(out, row, valid, column, columns, y)


@triton.jit
def forward_tiled_kernel(
    x,  # (rows, columns), strides (row_stride, 1)
    weight,  # (columns,) in the compute dtype, or None
    bias,  # (columns,), or None
    out,  # out (rows, columns), contiguous
    mean,  # out (rows,) in the compute dtype
    rstd,  # out (rows,)
    rows,
    columns,
    row_stride,  # in elements
    eps_high,  # high and low part
    eps_low,
    ROWS: tl.constexpr,  # of a tile, one program each
    COLUMNS: tl.constexpr,  # of a tile
):
    """Rows that are read three times, from the L2 but for the first."""
    dtype: tl.constexpr = mean.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    row = tl.minimum(row, rows - 1)
    tiles = tl.cdiv(columns, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype)
    for tile in range(0, tiles):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        total += load_tile(x, row, row_stride, column, columns, dtype)
    m = tl.sum(total, 1) / columns
    total = tl.zeros((ROWS, COLUMNS), dtype)
    squares = tl.zeros((ROWS, COLUMNS), dtype)
    for tile in range(0, tiles):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        z = load_tile(x, row, row_stride, column, columns, dtype) - m[:, None]
        z = tl.where((column < columns)[None, :], z, 0.0)
        total += z
        squares += z * z
    lost = tl.sum(total, 1) / columns
    variance = tl.sum(squares, 1) / columns - lost * lost
    variance = tl.where(variance < 0, 0.0, variance)  # of equal numbers; NaN stays
    m += lost
    r = tl.rsqrt(variance + join(eps_high, eps_low, dtype))
    tl.store(mean + row, m, mask=valid)
    tl.store(rstd + row, r, mask=valid)
    for tile in range(0, tiles):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        z = load_tile(x, row, row_stride, column, columns, dtype) - m[:, None]
        y = modulated(z * r[:, None], weight, bias, column, columns)
        store_tile(out, row, valid, column, columns, y)


@triton.jit
def gradient_tile(grad_out, x, weight, row, valid, grad_stride, row_stride, column, columns, m, r):
    """grad_out, grad_out weight, and x normalised, of a tile; m and r (n,) are its statistics."""
    dtype: tl.constexpr = m.dtype
    normal = load_tile(x, row, row_stride, column, columns, dtype)
    normal = (normal - m[:, None]) * r[:, None]
    g = load_tile(grad_out, row, grad_stride, column, columns, dtype)
    g = tl.where(valid[:, None], g, 0.0)
    return g, modulated(g, weight, None, column, columns), normal


@triton.jit
def backward_kernel(
    grad_out,  # (rows, columns), strides (grad_stride, 1)
    x,  # (rows, columns), strides (row_stride, 1)
    mean,  # (rows,) in the compute dtype
    rstd,  # (rows,)
    weight,  # (columns,), or None
    grad_x,  # out (rows, columns), contiguous, or None
    partials,  # out (chunks, 2, columns), or None: sums of g normal and of g
    rows,
    columns,
    grad_stride,  # in elements
    row_stride,
    chunk_rows,  # rows per program, a multiple of ROWS
    ROWS: tl.constexpr,  # of a tile
    COLUMNS: tl.constexpr,  # of a tile, at least columns
):
    """One chunk of rows, each read once."""
    dtype: tl.constexpr = mean.dtype.element_ty
    chunk = tl.program_id(0).to(tl.int64)
    begin = chunk * chunk_rows
    end = tl.minimum(begin + chunk_rows, rows)
    column = tl.arange(0, COLUMNS)
    if partials is not None:
        of_weight = tl.zeros((ROWS, COLUMNS), dtype)
        of_bias = tl.zeros((ROWS, COLUMNS), dtype)
    for step in range(0, tl.cdiv(end - begin, ROWS)):
        row = begin + step * ROWS + tl.arange(0, ROWS)
        valid = row < end
        row = tl.minimum(row, end - 1)
        r = tl.load(rstd + row)
        m = tl.load(mean + row)
        g, weighted, normal = gradient_tile(
            grad_out, x, weight, row, valid, grad_stride, row_stride, column, columns, m, r
        )
        if partials is not None:
            of_weight += g * normal
            of_bias += g
        if grad_x is not None:
            along = tl.sum(weighted * normal, 1) / columns
            level = tl.sum(weighted, 1) / columns
            gradient = weighted - level[:, None] - normal * along[:, None]
            store_tile(grad_x, row, valid, column, columns, gradient * r[:, None])
    if partials is not None:
        target = partials + chunk * 2 * columns + column
        tl.store(target, tl.sum(of_weight, 0), mask=column < columns)
        tl.store(target + columns, tl.sum(of_bias, 0), mask=column < columns)


@triton.jit
def backward_tiled_kernel(
    grad_out,  # (rows, columns), strides (grad_stride, 1)
    x,  # (rows, columns), strides (row_stride, 1)
    mean,  # (rows,) in the compute dtype
    rstd,  # (rows,)
    weight,  # (columns,), or None
    grad_x,  # out (rows, columns), contiguous, or None
    partials,  # out (chunks, 2, columns), or None: sums of g normal and of g
    rows,
    columns,
    grad_stride,  # in elements
    row_stride,
    chunk_rows,  # rows per program, a multiple of ROWS
    ROWS: tl.constexpr,  # of a tile
    COLUMNS: tl.constexpr,  # of a tile
):
    """One chunk of rows, read twice; column sums are kept in memory, which means in the L2."""
    dtype: tl.constexpr = mean.dtype.element_ty
    chunk = tl.program_id(0).to(tl.int64)
    begin = chunk * chunk_rows
    end = tl.minimum(begin + chunk_rows, rows)
    tiles = tl.cdiv(columns, COLUMNS)
    for step in range(0, tl.cdiv(end - begin, ROWS)):
        row = begin + step * ROWS + tl.arange(0, ROWS)
        valid = row < end
        row = tl.minimum(row, end - 1)
        m = tl.load(mean + row)
        r = tl.load(rstd + row)
        along = tl.zeros((ROWS,), dtype)
        level = tl.zeros((ROWS,), dtype)
        if grad_x is not None:
            for tile in range(0, tiles):
                column = tile * COLUMNS + tl.arange(0, COLUMNS)
                _, weighted, normal = gradient_tile(
                    grad_out, x, weight, row, valid, grad_stride, row_stride, column, columns, m, r
                )
                along += tl.sum(weighted * normal, 1)
                level += tl.sum(weighted, 1)
            along /= columns
            level /= columns
        for tile in range(0, tiles):
            column = tile * COLUMNS + tl.arange(0, COLUMNS)
            g, weighted, normal = gradient_tile(
                grad_out, x, weight, row, valid, grad_stride, row_stride, column, columns, m, r
            )
            if grad_x is not None:
                gradient = weighted - level[:, None] - normal * along[:, None]
                store_tile(grad_x, row, valid, column, columns, gradient * r[:, None])
            if partials is not None:
                sums = partials + chunk * 2 * columns + column
                inside = column < columns
                old = inside & (step > 0)
                of_weight = tl.load(sums, mask=old, other=0.0)
                tl.store(sums, of_weight + tl.sum(g * normal, 0), mask=inside)
                of_bias = tl.load(sums + columns, mask=old, other=0.0)
                tl.store(sums + columns, of_bias + tl.sum(g, 0), mask=inside)
        tl.debug_barrier()  # the next group of rows reads what other threads may have stored
