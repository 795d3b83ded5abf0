// Equal rows among points, found by hashing: sets of a few different points, as the states of a first layer are, are
// searched kind by kind.
#pragma once

#include <cstdint>
#include <vector>

namespace clmfast {

// The rows [n, D] of each kind, ascending; rows are equal if their bits are. No kinds at all if there are more than
// `most`, or if a sample of the rows says so.
std::vector<std::vector<int64_t>> kinds_of(const float* rows, int64_t n, int64_t D, int64_t most);

}  // namespace clmfast
