// channel_affine on whole tensors: units of work, threads, sums. No torch header.
#pragma once

#include "channel_affine.h"
#include "threads.h"

namespace ueo_fast::cpu {

// args.parameters and args.elements are filled in here.
template <class A>
void affine_forward(const AffineLoops<A>& loops, const ChannelLayout& layout, AffineForward<A> args,
                    const ChannelParameters<A>& parameters, const ParallelFor& parallel_for);

// The same; grad_weight and grad_bias (channels,), null where not needed, do not depend on how
// parallel_for splits its range.
template <class A>
void affine_backward(const AffineLoops<A>& loops, const ChannelLayout& layout,
                     AffineBackward<A> args, const ChannelParameters<A>& parameters,
                     A* grad_weight, A* grad_bias, const ParallelFor& parallel_for);

}  // namespace ueo_fast::cpu
