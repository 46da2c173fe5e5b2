"""What the loss's kernels share: exponents, logarithms, weights. Steps: docs/math.md."""

# Triton writes compile-time parameters in capitals, and a launch gives parameters their types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# One row of what forward keeps for backward, (B, 5).
ROW_MAX = tl.constexpr(0)  # max_c z_ic
ROW_SUM = tl.constexpr(1)  # sum_c exp(z_ic - max)
ROW_ENTROPY = tl.constexpr(2)  # H_i
ROW_CONFIDENCE = tl.constexpr(3)  # w_i
ROW_MARGINAL_WEIGHT = tl.constexpr(4)  # v_i, up to a factor common to all rows
ROW_STATS = tl.constexpr(5)

# What the batch sums up to, (5,). Means where csrc/ueo_loss.h has sums: the sum of weights that
# float32 can hold may be one that it cannot.
CONDITIONAL_ENTROPY = tl.constexpr(0)  # sum_i a_i H_i
MARGINAL_ENTROPY = tl.constexpr(1)  # H(q)
MEAN_CONFIDENCE = tl.constexpr(2)  # sum_i w_i / B
MEAN_ROW_CONFIDENCE = tl.constexpr(3)  # sum_i ROW_CONFIDENCE / B
MEAN_ROW_MARGINAL_WEIGHT = tl.constexpr(4)  # sum_i ROW_MARGINAL_WEIGHT / B

# The sums of one chunk of rows, (chunks, 5). A sum and its scale are factors: inside a chunk,
# weights are scaled to at most 1.
CHUNK_CONFIDENCE_SCALE = tl.constexpr(0)
CHUNK_CONFIDENCE = tl.constexpr(1)  # sum_i w_i / scale
CHUNK_ENTROPY = tl.constexpr(2)  # sum_i w_i / scale * H_i
CHUNK_MARGINAL_SCALE = tl.constexpr(3)
CHUNK_MARGINAL_WEIGHT = tl.constexpr(4)  # sum_i v_i / scale
CHUNK_SUMS = tl.constexpr(5)


@triton.jit
def saved_parts(saved, rows, columns):
    """Row statistics (B, 5), marginal (C,), summary (5,): what forward keeps lies in this order."""
    marginal = saved + rows * tl.full((), ROW_STATS, tl.int64)
    return saved, marginal, marginal + columns


@triton.jit
def join(high, low, dtype: tl.constexpr):
    """A float64 number that came as two float32 ones: that is what Triton makes of floats."""
    return tl.zeros((), dtype) + high + low


@triton.jit
def constant(dtype: tl.constexpr, double: tl.constexpr, single: tl.constexpr):
    """``double`` where arithmetic is in float64, else ``single``, in that type.

    A bare literal has the type that Triton gives it: what float32 holds only as a subnormal number
    is a float64 one, and makes everything that it meets float64. Only literals that float32 holds
    exactly (0.0, 1.0, 2.0), and factors of tensors, are written without this.
    """
    return tl.full((), double if dtype == tl.float64 else single, dtype)


@triton.jit
def clamp_exponent(t):
    """t, or where 2^t would be tiny an exponent for which it is exactly 0. NaN stays NaN."""
    lowest = constant(t.dtype, -1100.0, -200.0)
    return tl.where(t < lowest, lowest, t)


@triton.jit
def smallest_normal(dtype: tl.constexpr):
    """The smallest positive number that has all its digits."""
    return constant(dtype, 2.2250738585072014e-308, 1.1754943508222875e-38)


@triton.jit
def safe_log(x):
    """log of x or of the smallest normal number: finite for 0, NaN for NaN."""
    lowest = smallest_normal(x.dtype)
    return tl.log(tl.where(x < lowest, lowest, x))


@triton.jit
def log_in_step_8(p, eps, EPS: tl.constexpr):
    """What stands for log p, or log q, in step 8."""
    shifted = p + eps
    return tl.log(shifted) + p / shifted if EPS else safe_log(p)


@triton.jit
def load_weights(confidence, marginal_weights, row):
    """Given weights of rows: w (1 if not given) and v. ``row`` (n,) int64.

    v = 2 / w, not 1 / w: then v of every normal w is finite and more than a subnormal bit. A
    subnormal w has the v of the smallest normal one.
    """
    dtype: tl.constexpr = (
        confidence.dtype.element_ty if confidence is not None else marginal_weights.dtype.element_ty
    )
    w = tl.full(row.shape, 1.0, dtype)
    if confidence is not None:
        w = tl.load(confidence + row)
    if marginal_weights is not None:
        v = tl.load(marginal_weights + row)
    else:
        v = 2.0 / tl.maximum(w, smallest_normal(dtype))
    return w, v


@triton.jit
def largest_weights(confidence, marginal_weights, begin, end, BLOCK: tl.constexpr):
    """Largest given w and v of rows begin..end, or 1 where all are 0 or NaN."""
    first = begin + tl.arange(0, BLOCK)
    w, v = load_weights(confidence, marginal_weights, tl.minimum(first, end - 1))
    for step in range(1, tl.cdiv(end - begin, BLOCK)):
        row = tl.minimum(first + step * BLOCK, end - 1)
        next_w, next_v = load_weights(confidence, marginal_weights, row)
        w = tl.maximum(w, next_w)
        v = tl.maximum(v, next_v)
    w = tl.max(w, 0)
    v = tl.max(v, 0)
    return tl.where(w > 0, w, 1.0), tl.where(v > 0, v, 1.0)


@triton.jit
def store_row_stats(row_stats, row, valid, m, s, entropy, w, v):
    """One row of statistics for each of ``row`` (n,) that is valid."""
    target = row_stats + row * ROW_STATS
    tl.store(target + ROW_MAX, m, mask=valid)
    tl.store(target + ROW_SUM, s, mask=valid)
    tl.store(target + ROW_ENTROPY, entropy, mask=valid)
    tl.store(target + ROW_CONFIDENCE, w, mask=valid)
    tl.store(target + ROW_MARGINAL_WEIGHT, v, mask=valid)


@triton.jit
def store_chunk_sums(chunk_sums, chunk, scale_w, sum_w, sum_h, scale_v, sum_v):
    """The sums of a chunk, from those (n,) of the rows at each place of its tiles."""
    target = chunk_sums + chunk * CHUNK_SUMS
    tl.store(target + CHUNK_CONFIDENCE_SCALE, scale_w)
    tl.store(target + CHUNK_CONFIDENCE, tl.sum(sum_w, 0))
    tl.store(target + CHUNK_ENTROPY, tl.sum(sum_h, 0))
    tl.store(target + CHUNK_MARGINAL_SCALE, scale_v)
    tl.store(target + CHUNK_MARGINAL_WEIGHT, tl.sum(sum_v, 0))


@triton.jit
def step_8_factors(row_stats, summary, grad_loss, row, rows, trade_off, EPS: tl.constexpr):
    """Per row (n,), of B ``rows``: max, 1 / sum, and the factors of the two logarithms in step 8.

    The upstream gradient, 1 if it is None, is folded in here, before anything is rounded to the
    logits' dtype.
    """
    source = row_stats + row * ROW_STATS
    inverse_sum = 1.0 / tl.load(source + ROW_SUM)
    a = tl.load(source + ROW_CONFIDENCE) / tl.load(summary + MEAN_ROW_CONFIDENCE) / rows
    b = tl.load(source + ROW_MARGINAL_WEIGHT) / tl.load(summary + MEAN_ROW_MARGINAL_WEIGHT) / rows
    upstream = inverse_sum
    if grad_loss is not None:
        upstream = tl.load(grad_loss) * inverse_sum
    of_log_p = -a * upstream
    if not EPS:  # log p is log2(exp(z - max)) then
        of_log_p = of_log_p * LN2
    of_log_q = b * upstream * trade_off
    return tl.load(source + ROW_MAX), inverse_sum, of_log_p, of_log_q


@triton.jit
def step_8_bracket(e, t, inverse_sum, log_q, of_log_p, of_log_q, eps, EPS: tl.constexpr):
    """The bracket of step 8 before its mean under p is taken off; a tile, rows as (n, 1).

    One mean instead of two, of log p and of log q: where the two terms cancel they do so before
    anything is summed, which halves the error. On a confident row the mean is one of the values,
    exactly, and the gradient vanishes.
    """
    log_p = t
    if EPS:
        log_p = log_in_step_8(e * inverse_sum, eps, EPS)
    return of_log_p * log_p + of_log_q * log_q
