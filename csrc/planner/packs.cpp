// Packing items into bins under one budget, longest first.   n items
//
// Works on runs of equal lengths: a bin takes as many of a run as fit, and a group of bins in the same state takes them
// together, so that the packing costs a few thousand steps for a million items.  What is left per item is one pass that
// counts and one that writes.
#include "packs.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace mm::planner {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
// Tables as long as the budget or the longest item are worth it up to here; beyond, a tree or a sort takes their place.
int64_t table_limit(int64_t num_items) { return std::clamp<int64_t>(16 * num_items, 1 << 16, 1 << 24); }

// The smallest set bit at or after a position, by levels of 64-bit words.
class BitmapTree {
 public:
  explicit BitmapTree(int64_t size) {
    do {
      size = (size + 63) / 64;
      levels_.emplace_back(size);
    } while (size > 1);
  }
  void set(int64_t i) {
    for (auto& level : levels_) {
      level[i >> 6] |= uint64_t{1} << (i & 63);
      i >>= 6;
    }
  }
  void clear(int64_t i) {
    for (auto& level : levels_) {
      level[i >> 6] &= ~(uint64_t{1} << (i & 63));
      if (level[i >> 6] != 0) return;
      i >>= 6;
    }
  }
  int64_t at_or_after(int64_t i) const {
    for (size_t level = 0; level < levels_.size(); ++level) {
      if ((i >> 6) >= std::ssize(levels_[level])) return -1;
      if (const uint64_t word = levels_[level][i >> 6] >> (i & 63); word != 0) {
        i += std::countr_zero(word);
        while (level-- > 0) i = i * 64 + std::countr_zero(levels_[level][i]);
        return i;
      }
      i = (i >> 6) + 1;
    }
    return -1;
  }

 private:
  std::vector<std::vector<uint64_t>> levels_;
};

// Open bins that hold equally many items and have equal room: first, first + step, ... (step is 1 or -1).
struct Group {
  int64_t first, step, bins, items;
};

// Stacks of groups by room; the last group put in comes out first.
class StacksByRoom {
 public:
  explicit StacksByRoom(int64_t max_room) : top_(max_room + 1, -1), used_(max_room + 1) {}
  int64_t room_at_least(int64_t room) const { return used_.at_or_after(room); }
  Group& top(int64_t room) { return nodes_[top_[room]].group; }
  void pop(int64_t room) {
    const int32_t node = top_[room];
    top_[room] = nodes_[node].below;
    if (top_[room] < 0) used_.clear(room);
    nodes_[node].below = free_;
    free_ = node;
  }
  void push(int64_t room, const Group& group) {
    int32_t node = free_;
    if (node < 0) {
      node = static_cast<int32_t>(nodes_.size());
      nodes_.emplace_back();
    } else {
      free_ = nodes_[node].below;
    }
    nodes_[node] = {group, top_[room]};
    top_[room] = node;
    used_.set(room);
  }

 private:
  struct Node {
    Group group;
    int32_t below;
  };
  std::vector<Node> nodes_;
  std::vector<int32_t> top_;  // node on top of each stack, -1: empty
  BitmapTree used_;
  int32_t free_ = -1;
};

// The same for budgets too large for one stack per room.
class SortedStacks {
 public:
  int64_t room_at_least(int64_t room) const {
    const auto found = stacks_.lower_bound(room);
    return found == stacks_.end() ? -1 : found->first;
  }
  Group& top(int64_t room) { return stacks_.find(room)->second.back(); }
  void pop(int64_t room) {
    const auto found = stacks_.find(room);
    found->second.pop_back();
    if (found->second.empty()) stacks_.erase(found);
  }
  void push(int64_t room, const Group& group) { stacks_[room].push_back(group); }

 private:
  std::map<int64_t, std::vector<Group>> stacks_;
};

struct Run {
  int64_t length, count;
};

// Where the items of all runs go, run after run, and how many items each bin got.
struct Assignment {
  std::unique_ptr<int32_t[]> bin_of_rank;
  std::vector<int64_t> size;
};

// How many items of a length a bin takes that has `room` and may still take `places`.
int64_t fitting(int64_t length, int64_t room, int64_t places) {
  return std::min(length > 0 ? room / length : kNever, places);
}

template <typename Stacks>
void best_fit(const std::vector<Run>& runs, const PacksInput& in, Stacks stacks, Assignment& to) {
  int32_t* next = to.bin_of_rank.get();
  for (const Run& run : runs) {
    int64_t left = run.count;
    while (left > 0) {
      int64_t room = stacks.room_at_least(run.length);
      const bool open = room < 0;
      if (open) room = in.budget;
      Group group = open ? Group{std::ssize(to.size), 1, left, 0} : stacks.top(room);
      int64_t each = fitting(run.length, room, in.max_items - group.items);
      // The next bin gets the rest when it does not fill a whole bin.
      const int64_t bins = std::clamp<int64_t>(left / each, 1, group.bins);
      each = std::min(each, left);
      if (open) {
        to.size.resize(to.size.size() + bins);
      } else if (bins == group.bins) {
        stacks.pop(room);
      } else {
        Group& rest = stacks.top(room);
        rest.first += bins * rest.step;
        rest.bins -= bins;
      }
      for (int64_t i = 0; i < bins; ++i) {
        const int64_t bin = group.first + i * group.step;
        to.size[bin] += each;
        next = std::fill_n(next, each, static_cast<int32_t>(bin));
      }
      left -= bins * each;
      group.items += each;
      if (group.items < in.max_items)  // the bin that was filled last is the first to come out
        stacks.push(room - each * run.length, {group.first + (bins - 1) * group.step, -group.step, bins, group.items});
    }
  }
}

void first_fit(const std::vector<Run>& runs, const PacksInput& in, Assignment& to) {
  // Of the bins that could take more items at most one is half empty, which bounds how many bins there can be.
  int64_t total = 0;
  for (const Run& run : runs) total += run.length * run.count;
  const int64_t most = std::min(in.num_items, 2 * (total / in.budget) + 3 + in.num_items / in.max_items);
  // Leaves hold the room of each bin, -1 when it is closed; bins not opened yet have the whole budget.
  const auto leaves = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(most, 1))));
  std::vector<int64_t> room(2 * leaves, in.budget);
  int32_t* next = to.bin_of_rank.get();
  for (const Run& run : runs) {
    int64_t left = run.count;
    while (left > 0) {
      int64_t node = 1;
      while (node < leaves) node = 2 * node + (room[2 * node] < run.length ? 1 : 0);
      const int64_t bin = node - leaves;
      if (bin == std::ssize(to.size)) to.size.push_back(0);
      const int64_t each = std::min(fitting(run.length, room[node], in.max_items - to.size[bin]), left);
      next = std::fill_n(next, each, static_cast<int32_t>(bin));
      left -= each;
      to.size[bin] += each;
      room[node] = to.size[bin] < in.max_items ? room[node] - each * run.length : -1;
      while (node /= 2) room[node] = std::max(room[2 * node], room[2 * node + 1]);
    }
  }
}

Assignment assign(const std::vector<Run>& runs, const PacksInput& in) {
  Assignment to{std::make_unique_for_overwrite<int32_t[]>(in.num_items), {}};
  if (in.first_fit) {
    first_fit(runs, in, to);
  } else if (in.budget < table_limit(in.num_items)) {
    best_fit(runs, in, StacksByRoom(in.budget), to);
  } else {
    best_fit(runs, in, SortedStacks{}, to);
  }
  return to;
}

std::vector<int64_t> bounds_of(const std::vector<int64_t>& size) {
  std::vector<int64_t> offsets(size.size() + 1);
  std::partial_sum(size.begin(), size.end(), offsets.begin() + 1);
  return offsets;
}

// plan_packs of sorted items.   rank_of(i): the place of item i among all, longest first, equals in order of index
template <typename RankOf>
std::vector<int64_t> pack_runs(const std::vector<Run>& runs, const PacksInput& in, int64_t* order, RankOf rank_of) {
  const Assignment to = assign(runs, in);
  std::vector<int64_t> offsets = bounds_of(to.size);
  std::vector<int32_t> next(offsets.begin(), offsets.end() - 1);
  for (int64_t i = 0; i < in.num_items; ++i) order[next[to.bin_of_rank[rank_of(i)]]++] = i;
  return offsets;
}

}  // namespace

std::vector<int64_t> group_by_bin(const int64_t* bin_of, int64_t num_items, int64_t num_bins, int64_t* order) {
  std::vector<int64_t> size(num_bins);
  for (int64_t i = 0; i < num_items; ++i) ++size[bin_of[i]];
  std::vector<int64_t> offsets = bounds_of(size), next(offsets.begin(), offsets.end() - 1);
  for (int64_t i = 0; i < num_items; ++i) order[next[bin_of[i]]++] = i;
  return offsets;
}

template <typename Length>
std::vector<int64_t> plan_packs(const PacksInput& in, const Length* lengths, int64_t* order) {
  const int64_t n = in.num_items;
  if (n > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("plan_packs: lengths has more than 2**31 - 1 items");
  int64_t shortest = 0, longest = 0;
  for (int64_t i = 0; i < n; ++i) {
    shortest = std::min<int64_t>(shortest, lengths[i]);
    longest = std::max<int64_t>(longest, lengths[i]);
  }
  if (shortest < 0 || longest > in.budget)
    throw std::invalid_argument("plan_packs: lengths run from " + std::to_string(shortest) + " to " +
                                std::to_string(longest) + ", expected 0 to the budget " + std::to_string(in.budget));

  std::vector<Run> runs;
  if (longest < table_limit(n)) {
    std::vector<int32_t> first(longest + 1);  // of each length: its count, then its first rank, then its next one
    for (int64_t i = 0; i < n; ++i) ++first[lengths[i]];
    int32_t rank = 0;
    for (int64_t length = longest; length >= 0; --length) {
      if (first[length] > 0) runs.push_back({length, first[length]});
      rank += std::exchange(first[length], rank);
    }
    return pack_runs(runs, in, order, [&](int64_t i) { return first[lengths[i]]++; });
  }
  std::vector<int32_t> sorted(n), rank(n);
  std::iota(sorted.begin(), sorted.end(), 0);
  std::stable_sort(sorted.begin(), sorted.end(), [&](int32_t a, int32_t b) { return lengths[a] > lengths[b]; });
  for (int64_t r = 0; r < n; ++r) {
    rank[sorted[r]] = static_cast<int32_t>(r);
    if (r == 0 || lengths[sorted[r]] != lengths[sorted[r - 1]]) runs.push_back({lengths[sorted[r]], 0});
    ++runs.back().count;
  }
  return pack_runs(runs, in, order, [&](int64_t i) { return rank[i]; });
}

template std::vector<int64_t> plan_packs(const PacksInput&, const int32_t*, int64_t*);
template std::vector<int64_t> plan_packs(const PacksInput&, const int64_t*, int64_t*);

}  // namespace mm::planner
