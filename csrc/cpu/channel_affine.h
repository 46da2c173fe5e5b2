// The loops of channel_affine on raw memory: no torch header, so that tests and benchmarks can run
// them at a forced instruction set (tests/cpp).
#pragma once

#include <cstdint>

#include "../channel_affine.h"
#include "capability.h"

namespace ueo_fast::cpu {

// Where the parameters of an element are. Elements are numbered in the order of memory.
// By runs: element e uses those of channel (e / period) % channels.
// By columns: memory is rows of `period` elements (the last one may be shorter) and parameters are
// spread over one row: element e uses those at e % period.
template <class A>
struct Parameters {
  const A* scale;
  const A* shift;
  const A* mean;  // null in forward
  int64_t period;
  int64_t channels;
};

// The op's arguments per channel, (channels,) each; for null see csrc/library.cpp.
template <class A>
struct ChannelParameters {
  const A* weight;
  const A* bias;
  const A* mean;
  const A* var;
  A eps;
};

// A is the compute type: double for double elements, float for all others.
template <class A>
struct AffineForward {
  Storage storage;
  int64_t elements;
  Parameters<A> parameters;
  const void* x;
  const void* residual;  // or null
  void* out;
  uint8_t* bits;  // the mask (csrc/channel_affine.h), or null
  bool relu;
  bool stream;  // store past the cache
};

template <class A>
struct AffineBackward {
  Storage storage;
  int64_t elements;
  Parameters<A> parameters;
  const void* grad_out;
  const void* x;        // null where neither sums nor the mask need it
  const uint8_t* bits;  // the mask; null: from x if `relu`, else all ones
  void* grad_x;         // or null
  void* grad_residual;  // or null
  bool relu;
  bool stream;  // store past the cache
};

// Rows [row, row_end) and, of each, columns [column, column_end), a multiple of 8 at either end
// unless the row ends there.
struct Block {
  int64_t row;
  int64_t row_end;
  int64_t column;
  int64_t column_end;
};

// Sums are those of g, then of g (x - mean), where g is the masked gradient.
template <class A>
struct AffineLoops {
  // Elements [begin, end); begin is a multiple of kAffineTile.
  void (*forward_runs)(const AffineForward<A>& args, int64_t begin, int64_t end);
  void (*forward_columns)(const AffineForward<A>& args, const Block& block);
  // sums: a pair for every run that [begin, end) touches, in their order, or null.
  void (*backward_runs)(const AffineBackward<A>& args, int64_t begin, int64_t end, A* sums);
  // sums: those of g for the block's columns from sums[column] on, the others `period` behind; or
  // null.
  void (*backward_columns)(const AffineBackward<A>& args, const Block& block, A* sums);
};

// The loops for one instruction set; `capability` must be one that this machine can run.
template <class A>
const AffineLoops<A>& affine_loops(Capability capability);

}  // namespace ueo_fast::cpu
