// How the elements of an argument are stored. No torch header.
#pragma once

namespace ueo_fast {

enum class Storage { kFloat, kDouble, kHalf, kBFloat16 };

inline int bytes_of(Storage storage) {
  return storage == Storage::kDouble ? 8 : storage == Storage::kFloat ? 4 : 2;
}

}  // namespace ueo_fast
