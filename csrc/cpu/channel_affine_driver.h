// channel_affine on whole tensors: units of work, threads, sums. No torch header.
#pragma once

#include "channel_affine.h"
#include "threads.h"

namespace ueo_fast::cpu {

// args.parameters and args.elements are filled in here: `scale` and `shift` are (channels,).
template <class A>
void affine_forward(const AffineLoops<A>& loops, const ChannelLayout& layout, AffineForward<A> args,
                    const A* scale, const A* shift, const ParallelFor& parallel_for);

// The same; sums (2, channels) or null: see AffineLoops. They do not depend on how parallel_for
// splits its range.
template <class A>
void affine_backward(const AffineLoops<A>& loops, const ChannelLayout& layout,
                     AffineBackward<A> args, const A* scale, const A* shift, const A* center,
                     A* sums, const ParallelFor& parallel_for);

}  // namespace ueo_fast::cpu
