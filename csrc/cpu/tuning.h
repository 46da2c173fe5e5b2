// Every tuning number of the CPU kernels, each with its reason. Measured with
// benchmarks/bench_ueo_loss.py; docs/performance.md says what was tried.
#pragma once

#include <cstdint>

namespace ueo_fast::cpu::tuning {

// Columns handled by one call of an inner loop. Two tiles of float32 stay in a 32 KiB L1 with
// the column sums; sums are float inside a tile and double across tiles, which keeps the error of
// a 50,000-column row at that of a 1,024-column one.
inline constexpr int64_t kTileColumns = 1024;

// Inner loops run over multiples of this many elements: one AVX-512 register of float, two of
// double, so no instruction set ever executes a scalar remainder.
inline constexpr int64_t kPad = 16;

// How far ahead of the current row logits are prefetched, rounded up to whole rows: about the
// latency of memory.
inline constexpr int64_t kPrefetchBytes = 4096;

// Rows whose exponentials are added to the column sums together: one load and store of the sums
// per four rows instead of per row.
inline constexpr int64_t kRowGroup = 4;

// Rows per block of column sums. Blocks depend on the shape alone, never on the number of threads:
// the same input gives the same bits on any number of threads. At most 256 floats are
// added in one sum before it goes on in double; at least 32 rows keep the partial sums below 1/32 of
// the logits (and leave a batch of few rows to few threads); 64 blocks balance many threads.
inline constexpr int64_t kMinRowsPerBlock = 32;
inline constexpr int64_t kMaxRowsPerBlock = 256;
inline constexpr int64_t kTargetBlocks = 64;

// Elements below which a second thread costs more than it saves.
inline constexpr int64_t kSerialElements = 16384;

// Bytes of gradient from which stores go past the cache: at this size the lines would be evicted
// before they are read, and a cached store first reads the line that it overwrites.
inline constexpr int64_t kStreamBytes = int64_t{8} << 20;

// ---- channel_affine ----

// Elements handled by one call of the inner loops: three buffers of double stay in a 48 KiB L1.
inline constexpr int64_t kAffineTile = 2048;

// How far ahead backward prefetches its tiles, in elements.
inline constexpr int64_t kAffineFetch = 8192;

// Channels whose adjacent elements (`inner`) are at least that many are computed with the channel's
// scale as a constant. Below, scales are spread over the elements: short runs would end in
// remainders, 7 x 7 = 49 among them.
inline constexpr int64_t kMinRun = 64;

// Elements of a unit of work there, from the shape alone (see kMinRowsPerBlock); a multiple of the
// tile.
inline constexpr int64_t kAffineChunk = 16384;

// Bytes of a result from which stores go past the cache (see kStreamBytes), below kMinRun and with
// a residual: a quarter less time at 205 MB of float32, and no gain elsewhere. Twice the last-level
// cache of most processors: a network's next layer reads what this one stored.
inline constexpr int64_t kAffineStreamBytes = int64_t{32} << 20;

// Rows per unit below kMinRun, where a row is scales spread over at least kMinSpread elements.
inline constexpr int64_t kMinSpread = 512;
inline constexpr int64_t kMinAffineRows = 16;
inline constexpr int64_t kMaxAffineRows = 256;

}  // namespace ueo_fast::cpu::tuning
