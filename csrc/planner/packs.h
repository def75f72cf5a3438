// Packing items into bins under one or several budgets.   n items, K budgets
#pragma once

#include <cstdint>
#include <vector>

namespace mm::planner {

enum class Policy { kBestFit, kFirstFit, kStream };

struct PacksInput {
  const int64_t* lengths;  // [n, K], each 0 <= length <= its budget
  const int64_t* budgets;  // [K], positive
  int64_t num_items, num_budgets;
  int64_t max_items;  // per bin
  Policy policy;
};

struct Packs {
  std::vector<int64_t> order;    // [n] items of bin 0 in order of index, of bin 1, ...; bins in order of opening
  std::vector<int64_t> offsets;  // [bins + 1]
};

// Throws std::invalid_argument naming the argument at fault.
Packs plan_packs(const PacksInput& in);

}  // namespace mm::planner
