// How the elements of an argument are stored. No torch header.
#pragma once

namespace ueo_fast {

enum class Storage { kFloat, kDouble, kHalf, kBFloat16 };

}  // namespace ueo_fast
