"""Scale and shift per channel, and their gradients, over memory seen as (outer, channels, inner).

Forward is flat: a program takes adjacent elements whatever their layout, because a byte of the mask
is eight adjacent elements, which may lie in two channels. Backward goes by tiles of channels, each
added up by one program per chunk.
"""

# Triton writes compile-time parameters in capitals, and a launch gives parameters their types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from ueo_fast.triton.ueo_loss_math import join


@triton.jit
def channel_of(
    base,  # int64: the program's first element
    offset,  # int32, any shape, below BLOCK: elements from there
    channels,
    inner,
    BLOCK: tl.constexpr,  # elements of a program
    SHORT: tl.constexpr,  # whether inner < BLOCK
    NARROW: tl.constexpr,  # whether channels < BLOCK
):
    """The channels of elements: 64-bit divisions once per program, at most 32-bit ones for each."""
    plane = base // inner
    rest = base - plane * inner
    first = plane % channels
    if SHORT:
        further = (rest.to(tl.int32) + offset) // inner
    else:
        further = (offset >= tl.minimum(inner - rest, BLOCK).to(tl.int32)).to(tl.int32)
    if SHORT and NARROW:
        channel = (first.to(tl.int32) + further) % channels
    else:  # at most one round
        channel = first + further
        channel = tl.where(channel >= channels, channel - channels, channel)
    return channel


@triton.jit
def inverse_deviation(var, eps_high, eps_low, channel, there, dtype: tl.constexpr):
    """1 / sqrt(var + eps)"""
    value = tl.load(var + channel, mask=there, other=0.0).to(dtype)
    return tl.rsqrt(value + join(eps_high, eps_low, dtype))


@triton.jit
def modulation(
    weight,  # (channels,), or None, as all of these
    bias,
    mean,
    var,
    eps_high,  # high and low part
    eps_low,
    channel,
    there,
    dtype: tl.constexpr,
):
    """scale = weight / sqrt(var + eps), shift = bias - mean scale, and the mean.

    What is None is left out.
    """
    scale = tl.full(channel.shape, 1.0, dtype)
    shift = tl.full(channel.shape, 0.0, dtype)
    center = tl.full(channel.shape, 0.0, dtype)
    if var is not None:
        scale = inverse_deviation(var, eps_high, eps_low, channel, there, dtype)
    if weight is not None:
        scale *= tl.load(weight + channel, mask=there, other=0.0).to(dtype)
    if bias is not None:
        shift = tl.load(bias + channel, mask=there, other=0.0).to(dtype)
    if mean is not None:
        center = tl.load(mean + channel, mask=there, other=0.0).to(dtype)
        shift = tl.fma(-center, scale, shift)
    return scale, shift, center


@triton.jit
def modulate(x, scale, shift):
    """x * scale + shift, rounded once, so that backward finds what forward found."""
    return tl.fma(x, scale, shift)


@triton.jit
def forward_kernel(
    x,  # (elements,) in the order of memory
    residual,  # (elements,), or None
    weight,  # see modulation()
    bias,
    mean,
    var,
    eps_high,
    eps_low,
    out,  # out (elements,)
    bits,  # out (elements / 8 rounded up,) uint8, or None
    elements,
    channels,
    inner,
    RELU: tl.constexpr,
    SHORT: tl.constexpr,  # whether inner < 8 GROUPS
    NARROW: tl.constexpr,  # whether channels < 8 GROUPS
    ALIGNED: tl.constexpr,  # whether the elements of a byte share a channel
    GROUPS: tl.constexpr,  # bytes of the mask per program
):
    """out = relu?(x scale + shift (+ residual)); a bit is set where the gradient passes."""
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    group = tl.program_id(0).to(tl.int64) * GROUPS
    base = group * 8
    bit = tl.arange(0, 8)[None, :]
    first = tl.arange(0, GROUPS)[:, None] * 8
    offset = first + bit
    inside = base + offset < elements
    place = first if ALIGNED else offset  # a thread has a byte: its channel's numbers once
    channel = channel_of(base, place, channels, inner, GROUPS * 8, SHORT, NARROW)
    there = base + place < elements
    a, b, _ = modulation(weight, bias, mean, var, eps_high, eps_low, channel, there, dtype)
    y = modulate(tl.load(x + base + offset, mask=inside, other=0.0).to(dtype), a, b)
    if residual is not None:
        y += tl.load(residual + base + offset, mask=inside, other=0.0).to(dtype)
    rounded = y.to(out.dtype.element_ty)
    if RELU:
        # As threshold_backward: NaN is not <= 0, and passes.
        stopped = rounded.to(dtype) <= 0
        rounded = tl.where(stopped, 0.0, rounded)
        if bits is not None:
            byte = tl.sum(tl.where(stopped | (base + offset >= elements), 0, 1 << bit), 1)
            lane = tl.arange(0, GROUPS)
            target = bits + group + lane
            tl.store(target, byte.to(tl.uint8), mask=base + lane * 8 < elements)
    tl.store(out + base + offset, rounded, mask=inside)


@triton.jit
def backward_kernel(
    grad_out,  # (outer, channels, inner)
    x,  # as grad_out, or None
    weight,  # see modulation()
    bias,
    mean,
    var,
    eps_high,
    eps_low,
    bits,  # uint8, the mask of forward, or None
    grad_x,  # out, as grad_out, or None
    grad_residual,  # out, as grad_out, or None
    partials,  # out (chunks, 2, channels), or None: sums of g and of g (x - mean)
    outer,
    channels,
    inner_units,  # inner / UNIT
    channel_tiles,
    inner_tiles,
    tiles,  # of a tile of channels
    chunk_tiles,  # per program
    FROM_X: tl.constexpr,  # whether the mask is found again from x
    UNIT: tl.constexpr,  # a divisor of inner
    OUTER: tl.constexpr,  # of a tile
    CHANNELS: tl.constexpr,  # of a tile
    INNER: tl.constexpr,  # of a tile
):
    """One chunk of one tile of channels: g = grad_out where out is positive, and what it gives."""
    dtype: tl.constexpr = tl.float64 if grad_out.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0).to(tl.int64)
    chunk = program // channel_tiles
    channel = (program % channel_tiles) * CHANNELS + tl.arange(0, CHANNELS)
    there = channel < channels
    inner = tl.full((), UNIT, tl.int64) * inner_units
    begin = chunk * chunk_tiles
    end = tl.minimum(begin + chunk_tiles, tiles)
    outer_tile = begin // inner_tiles
    inner_tile = begin - outer_tile * inner_tiles

    a, b, center = modulation(weight, bias, mean, var, eps_high, eps_low, channel, there, dtype)
    a, b, center = a[None, :, None], b[None, :, None], center[None, :, None]
    if partials is not None:
        sum_g = tl.zeros((OUTER, CHANNELS, INNER), dtype)
        sum_gx = tl.zeros((OUTER, CHANNELS, INNER), dtype)
    for _ in range(begin, end):
        row = outer_tile * OUTER + tl.arange(0, OUTER)
        index = inner_tile * INNER + tl.arange(0, INNER)
        plane = (row * channels)[:, None, None] + channel[None, :, None]
        offset = plane * inner + index[None, None, :]
        inside = (row < outer)[:, None, None] & there[None, :, None]
        inside = inside & (index < inner)[None, None, :]
        g = tl.load(grad_out + offset, mask=inside, other=0.0).to(dtype)
        if x is not None:
            value = tl.load(x + offset, mask=inside, other=0.0).to(dtype)
        if FROM_X:
            rounded = modulate(value, a, b).to(grad_out.dtype.element_ty).to(dtype)
            g = tl.where(rounded <= 0, 0.0, g)
        if bits is not None:
            byte = tl.load(bits + (offset >> 3), mask=inside, other=0).to(tl.int32)
            g = tl.where((byte >> (offset & 7).to(tl.int32)) & 1 == 0, 0.0, g)
        if grad_residual is not None:
            tl.store(grad_residual + offset, g.to(grad_out.dtype.element_ty), mask=inside)
        if grad_x is not None:
            tl.store(grad_x + offset, (g * a).to(grad_out.dtype.element_ty), mask=inside)
        if partials is not None:
            sum_g += g
            sum_gx += g * (value - center)
        inner_tile += 1
        wraps = inner_tile == inner_tiles
        outer_tile += wraps.to(tl.int64)
        inner_tile = tl.where(wraps, 0, inner_tile)
    if partials is not None:
        target = partials + chunk * 2 * channels + channel
        tl.store(target, tl.sum(tl.sum(sum_g, 2), 0), mask=there)
        tl.store(target + channels, tl.sum(tl.sum(sum_gx, 2), 0), mask=there)


@triton.jit
def finish_sums_kernel(
    partials,  # (chunks, 2, columns)
    first,  # out (columns,), or None
    second,  # out (columns,), or None
    var,  # (columns,), or None: what the second sum is divided by the root of
    eps_high,
    eps_low,
    chunks,
    columns,
    CHUNKS: tl.constexpr,  # of a tile
    COLUMNS: tl.constexpr,  # of a tile, one program each
):
    """Two sums over chunks, in double and in a fixed order."""
    dtype: tl.constexpr = partials.dtype.element_ty
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < 2 * columns
    total = tl.zeros((CHUNKS, COLUMNS), tl.float64)
    for step in range(0, tl.cdiv(chunks, CHUNKS)):
        chunk = step * CHUNKS + tl.arange(0, CHUNKS).to(tl.int64)
        source = partials + chunk[:, None] * (2 * columns) + column[None, :]
        total += tl.load(source, mask=(chunk < chunks)[:, None] & inside[None, :], other=0.0)
    value = tl.sum(total, 0).to(dtype)
    if first is not None:
        tl.store(first + column, value.to(first.dtype.element_ty), mask=column < columns)
    if second is not None:
        column -= columns
        there = (column >= 0) & (column < columns)
        if var is not None:
            value *= inverse_deviation(var, eps_high, eps_low, column, there, dtype)
        tl.store(second + column, value.to(second.dtype.element_ty), mask=there)
