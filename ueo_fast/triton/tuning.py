"""Every tuning number of the Triton kernels, each with its reason, and the plan of a launch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """Reasons are arithmetic, not measurements: ``UEO_FAST_TRITON_AUTOTUNE=1`` looks for better.

    Sizes in elements hold for float32 arithmetic; float64 takes a quarter of them: a number is two
    registers, and its exp2 and log are polynomials that need as many again.
    """

    elements_per_thread: int = 16
    """Of a tile of logits: 64 bytes per thread in flight; with the column sums and the
    exponentials some 100 registers."""

    tile_elements: int = 2048
    """Of a tile of several short rows: four warps at 16 elements per thread."""

    max_block_columns: int = 8192
    """Longest row that is held in registers (16 warps). Above, the padding to a power of two and
    the column sums in registers cost more than reading the row again, which the L2 then serves."""

    min_block_columns: int = 8
    """Of a tile of short rows: a layout with fewer leaves threads of a warp without a column."""

    max_block_rows: int = 64
    """Of a tile of short rows, with at least min_warps: four rows per thread. Each costs a dozen
    registers in addition to its logits; sixteen took 254."""

    min_warps: int = 4
    """See max_block_rows; of longer rows it is what tile_elements asks for."""

    tiled_columns: int = 2048
    tiled_rows: int = 2
    """Tile of a row that is not held. Two rows share one update of the column sums in memory; more
    rows would not survive in the L2 (2 rows of 21,841 floats on each of 132 SMs are 23 MB of 50)
    until they are read again."""

    tiled_warps: int = 16
    """8 elements per thread of such a tile: with 16, sixteen warps spill (128 registers each)."""

    tiled_slot: int = 4
    """Elements of a row that one thread holds of such a tile: a slot for each of its 512 threads.
    Vectors of half precision are 8 elements; there the tile is twice as wide, so that each thread
    still holds the same columns of both rows and adds them up by itself."""

    warps_per_processor: int = 16
    """Programs are as many as are resident at once with 128 registers: one wave, 32 KiB of loads
    in flight per SM, more than what memory's latency asks for. Each costs a row of partial column
    sums. One program of a tiled kernel: see tiled_rows."""

    max_tiles_per_chunk: int = 256
    """Additions that meet in one float of the column sums, before sums go on in double."""

    finish_chunks: int = 128
    finish_columns: int = 16
    """Tile of the sum over chunks: 64 bytes of each of 128 partial sums, so that a thousand
    chunks are eight dependent loads, and 345 columns still occupy 22 SMs."""

    finish_few_chunks: int = 16
    finish_few_columns: int = 128
    """The same for up to 16 chunks (a batch of 64): no lane is idle."""

    finish_warps: int = 4
    """16 elements per thread, as everywhere."""

    weights_block: int = 256
    """Given weights looked at together for the largest of a chunk: about a chunk."""

    interpreted_processors: int = 1
    """Processors of a CPU tensor's device (Triton's interpreter runs programs one by one)."""

    max_spilled_bytes: int = 24
    """Budget per thread on NVIDIA GPUs of variants with fewer registers than they could have, which
    is ptxas's choice: another program is resident instead. Everything else spills nothing."""

    max_shared_bytes: int = 32768
    """Budget per program: reductions across warps, and a tile of 8,192 floats whose layout changes
    (half of gfx942's local memory, for the one program that 16 of its wavefronts are)."""

    max_vector_registers: int = 128
    """Budget per thread on gfx942 in float32: four wavefronts per SIMD."""


TUNING = Tuning()


@dataclass(frozen=True)
class Budget:
    """What each variant of a kernel may take of an NVIDIA GPU.

    The most that Triton 3.6 and 3.9 made of it, and up to 16 registers: tests say so when a change,
    or a new Triton, costs more. With 128 registers per thread 16 warps are resident on an SM, with
    168 twelve; rows that are not held have 16 warps, and so 128 at most.
    """

    registers: int
    registers_double: int
    """Where arithmetic is in float64."""

    loop_instructions: int | None = None
    """Of a thread in the loops over one tile, on sm_90, for odd rows and without eps, which has a
    logarithm per element."""


BUDGETS = {
    "ueo_loss_kernels.forward_kernel": Budget(128, 168),
    "ueo_loss_kernels.backward_kernel": Budget(120, 128),
    "ueo_loss_kernels.finish_kernel": Budget(104, 136),
    "ueo_loss_kernels.max_softmax_kernel": Budget(48, 48),
    "ueo_loss_tiled_kernels.forward_tiled_kernel": Budget(128, 128, loop_instructions=300),
    "ueo_loss_tiled_kernels.backward_tiled_kernel": Budget(128, 128, loop_instructions=540),
    "ueo_loss_tiled_kernels.max_softmax_tiled_kernel": Budget(64, 64, loop_instructions=150),
}
"""Of the loss's kernels, by module and name."""


@dataclass(frozen=True)
class Plan:
    """How a (B, C) problem is cut: chunks of rows, one per program, walked tile by tile."""

    block_columns: int  # columns of a tile; all of them unless tiled
    block_rows: int  # rows of a tile
    tiled: bool  # whether a row takes several tiles
    warps: int  # of a program
    chunk_rows: int  # rows of a chunk, a multiple of block_rows
    chunks: int
    slot: int = 1  # of a tiled row, the elements of a tile in one thread

    @property
    def finish_tile(self) -> tuple[int, int]:
        """Chunks and columns that a program of the sum over chunks takes at once."""
        if self.chunks <= TUNING.finish_few_chunks:
            return TUNING.finish_few_chunks, TUNING.finish_few_columns
        return TUNING.finish_chunks, TUNING.finish_columns


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def make_plan(
    rows: int, columns: int, double: bool, processors: int, tile_scale: float = 1.0
) -> Plan:
    """The default plan; ``tile_scale`` 2 or 0.5 changes the rows per tile or, for one row, warps.

    Args:
        rows, columns: B and C.
        double: whether arithmetic is in float64.
        processors: SMs (compute units) of the device.
        tile_scale: a power of two, for the search.
    """
    share = 4 if double else 1
    per_thread = TUNING.elements_per_thread // share
    block_columns = max(_power_of_two(columns), TUNING.min_block_columns)
    tiled = block_columns > TUNING.max_block_columns // share
    if tiled:
        block_columns = TUNING.tiled_columns // share
        block_rows = TUNING.tiled_rows
        warps = TUNING.tiled_warps
    else:
        block_rows = max(TUNING.tile_elements // share // block_columns, 1)
        block_rows = min(block_rows, TUNING.max_block_rows)
        warps = max(block_rows * block_columns // (32 * per_thread), TUNING.min_warps)
    if block_rows > 1 and not tiled:
        block_rows = max(int(block_rows * tile_scale), 1)
    else:
        warps = min(max(int(warps / tile_scale), 1), 16)  # 1,024 threads on AMD
    programs = max(processors * TUNING.warps_per_processor // warps, 1)
    tiles = -(-rows // block_rows)
    tiles_per_chunk = min(-(-tiles // programs), TUNING.max_tiles_per_chunk)
    return Plan(
        block_columns=block_columns,
        block_rows=block_rows,
        tiled=tiled,
        warps=warps,
        chunk_rows=tiles_per_chunk * block_rows,
        chunks=-(-tiles // tiles_per_chunk),
        slot=TUNING.tiled_slot // share if tiled else 1,
    )
