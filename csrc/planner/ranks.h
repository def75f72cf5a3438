// Items over ranks so that no rank has much more to do than another.   n items, R ranks, K costs
#pragma once

#include <cstdint>
#include <vector>

namespace mm::planner {

struct RanksInput {
  const double* costs;   // [n, K], in units of the mean load of a rank
  const int64_t* order;  // [n]: items in the order in which they are given out
  int64_t num_items, num_costs, num_ranks;
  bool equal_count;  // counts of two ranks differ by at most one
};

// The rank of each item.  A load is the largest of a rank's K summed costs. Each item goes to the rank whose load then
// is least (the first of equals); then the rank with the greatest load gives an item away or swaps one, whichever
// lowers the greater of the two loads most, as long as the greatest load falls and the work bound allows.
std::vector<int64_t> balance_ranks(const RanksInput& in);

}  // namespace mm::planner
