"""How a per-channel problem is cut for the Triton kernels, each number with its reason."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ueo_fast.triton.tuning import TUNING, Budget, Plan


@dataclass(frozen=True)
class AffineTuning:
    """Reasons are arithmetic, not measurements, as in ``tuning.Tuning``, which has the rest.

    From there come the tiles per chunk and the tile of the sum over chunks; layer normalisation
    takes the loss's plan. Sizes in elements hold for float32 arithmetic; float64 takes a quarter of
    them.
    """

    tile_elements: int = 1024
    """Of a tile: four warps at 8 elements per thread, two loads of 16 bytes in float32. With 16,
    the offsets (two registers each), the two sums and three tensors took up to 168 registers."""

    warps: int = 4
    """Of a program: a sum meets across warps once per chunk."""

    warps_per_processor: int = 24
    """Six programs of backward: resident at once with 80 registers, which most variants are below.
    In half precision 24 KiB of loads are in flight per SM; each program costs partial sums."""

    min_inner: int = 64
    max_inner: int = 256
    """Of a tile, of the elements that share a channel: 8 to 32 lanes of 16 bytes read on end. From
    what lies between, the one that is padded least is taken (784 = 28 x 28 is 13 x 64)."""

    max_span: int = 128
    """Adjacent elements of a tile where channels are the fastest: 256 bytes in half precision. A
    program's partial sums are twice as many, written and read again."""

    unit: int = 8
    """Largest power of two by which the kernels know the elements per channel to be divisible:
    16 bytes in half precision. 14 x 14 is divisible by 4, which is 16 bytes in float32."""

    tiled_share: int = 2
    """Backward of rows that are not held reads two tensors where the loss reads one: half the
    columns and warps per program, and twice the programs. Sixteen warps have 128 registers at
    most, which spilled; two programs of eight may take as many."""

    bits_per_byte: int = 8
    """Elements of the flat kernel's groups: one byte of the mask each."""


AFFINE = AffineTuning()


BUDGETS = {
    "channel_affine_kernels.forward_kernel": Budget(48, 48),
    "channel_affine_kernels.backward_kernel": Budget(128, 80),
    "channel_affine_kernels.finish_sums_kernel": Budget(80, 96),
    "layer_norm_kernels.forward_kernel": Budget(64, 80),
    "layer_norm_kernels.backward_kernel": Budget(128, 120),
    "layer_norm_kernels.forward_tiled_kernel": Budget(72, 56),
    "layer_norm_kernels.backward_tiled_kernel": Budget(128, 80),
}
"""Of the affine kernels, by module and name."""


@dataclass(frozen=True)
class AffinePlan:
    """How (outer, channels, inner) is cut: tiles of channels, each with chunks of the rest."""

    outer: int  # of a tile
    channels: int  # of a tile
    inner: int  # of a tile
    warps: int  # of a program
    channel_tiles: int
    chunk_tiles: int  # tiles that a program walks
    chunks: int
    unit: int  # divides `inner` of the problem


def power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def flat_groups(double: bool) -> int:
    """Groups of eight elements, a byte of the mask each, of a program of the flat kernel."""
    return AFFINE.tile_elements // (4 if double else 1) // AFFINE.bits_per_byte


def _inner_tile(inner: int) -> int:
    if inner <= AFFINE.min_inner:
        return power_of_two(inner)
    sizes = [AFFINE.min_inner]
    while sizes[-1] < AFFINE.max_inner:
        sizes.append(2 * sizes[-1])
    return min(sizes, key=lambda size: (-(-inner // size) * size, -size))


def make_affine_plan(
    outer: int, channels: int, inner: int, double: bool, processors: int
) -> AffinePlan:
    """The plan of backward, whose programs add up; sizes are those of the problem, all above 0.

    Args:
        outer, channels, inner: memory as (outer, channels, inner).
        double: whether arithmetic is in float64.
        processors: SMs (compute units) of the device.
    """
    elements = AFFINE.tile_elements // (4 if double else 1)
    tile_inner = _inner_tile(inner)
    tile_channels = min(power_of_two(channels), elements // tile_inner)
    if inner == 1:
        tile_channels = min(tile_channels, AFFINE.max_span)
    tile_outer = min(power_of_two(outer), elements // (tile_inner * tile_channels))
    channel_tiles = -(-channels // tile_channels)
    tiles = -(-outer // tile_outer) * -(-inner // tile_inner)
    programs = processors * AFFINE.warps_per_processor // AFFINE.warps
    chunks = min(max(-(-programs // channel_tiles), 1), tiles)
    chunk_tiles = min(-(-tiles // chunks), TUNING.max_tiles_per_chunk)
    return AffinePlan(
        outer=tile_outer,
        channels=tile_channels,
        inner=tile_inner,
        warps=AFFINE.warps,
        channel_tiles=channel_tiles,
        chunk_tiles=chunk_tiles,
        chunks=-(-tiles // chunk_tiles),
        unit=math.gcd(inner, AFFINE.unit),
    )


def layer_norm_backward_plan(plan: Plan, rows: int) -> Plan:
    """What backward of layer normalisation makes of the loss's plan for as many rows."""
    if not plan.tiled:
        return plan
    share = AFFINE.tiled_share
    chunk_rows = -(-plan.chunk_rows // (plan.block_rows * share)) * plan.block_rows
    return dataclasses.replace(
        plan,
        block_columns=plan.block_columns // share,
        warps=max(plan.warps // share, 1),
        chunk_rows=chunk_rows,
        chunks=-(-rows // chunk_rows),
    )
