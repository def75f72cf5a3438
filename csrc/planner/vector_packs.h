// Packing items into bins under several budgets at once.   n items, K budgets
#pragma once

#include <cstdint>
#include <vector>

namespace mm::planner {

struct VectorPacksInput {
  const int64_t* lengths;  // [n, K], each at most its budget
  const int64_t* budgets;  // [K]
  const double* scales;    // [K], what one unit of room is worth
  int64_t num_items, num_budgets;
  int64_t max_items;  // per bin, positive
};

// Bins filled one after another: each takes, of the items that still fit, the one that leaves it the least room, by sum
// over k of (scales[k] * room[k])^2.  It looks at 128 items, in order, of a pool of a few thousand.  Items come in
// falling order of `sizes` [n], sum over k of weights[k] * lengths[k].  bin_of [n] is written; returns the number of
// bins.
int64_t pool_fit(const VectorPacksInput& in, const double* sizes, const double* weights, int64_t* bin_of);

// What goes on from one call of scan_fit to the next: bins that take items, in order of opening.
struct OpenBins {
  std::vector<int64_t> ids, counts;  // [open]
  std::vector<int64_t> room;         // [open, K]
  int64_t next_id = 0;
};

// Items in order of arrival, at most `max_open` bins open: each item goes to the bin that it leaves the least room, by
// sum over k of scales[k] * room[k], or (`first`) to the first with room.  When it fits nowhere, a bin is closed to
// make place for a new one: the fullest, or of several budgets the oldest.  bin_of [n] is written; returns the bins
// closed, in order of closing.
std::vector<int64_t> scan_fit(const VectorPacksInput& in, OpenBins& open, int64_t max_open, bool first,
                              int64_t* bin_of);

}  // namespace mm::planner
