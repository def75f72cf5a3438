// Packing items into bins under one budget, longest first.   n items
#pragma once

#include <cstdint>
#include <vector>

namespace mm::planner {

struct PacksInput {
  int64_t num_items;
  int64_t budget;     // positive
  int64_t max_items;  // per bin, positive
  bool first_fit;     // else best fit
};

// Writes `order` [n]: the items of bin 0 in order of index, of bin 1, ...; bins in order of opening.  Returns their
// bounds, [bins + 1].  Length is int32_t or int64_t; each length lies between 0 and the budget, else
// std::invalid_argument.
template <typename Length>
std::vector<int64_t> plan_packs(const PacksInput& in, const Length* lengths, int64_t* order);

// The same from the bin of each item, for those who found the bins in another way.
std::vector<int64_t> group_by_bin(const int64_t* bin_of, int64_t num_items, int64_t num_bins, int64_t* order);

}  // namespace mm::planner
