// Packing items into bins under one or several budgets.   n items, K budgets
#include "packs.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>

namespace mm::planner {
namespace {

constexpr int64_t kMaxBuckets = int64_t{1} << 24;        // larger budgets keep bins in a tree instead of buckets
constexpr int64_t kMaxCountedLength = int64_t{1} << 22;  // longer items are sorted by comparison
constexpr int64_t kOpenBinsStream = 64, kOpenBinsSorted = 1024;

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

// Open bins by the room they have left; among equals the last one put in comes out first.
class BucketedBins {
 public:
  BucketedBins(int64_t max_room, int64_t max_bins) : head_(max_room + 1, -1), next_(max_bins), used_(max_room + 1) {}
  void put(int64_t room, int32_t bin) {
    next_[bin] = head_[room];
    head_[room] = bin;
    used_.set(room);
  }
  // Takes out the fullest bin with at least this room; {-1, -1} when there is none.
  std::pair<int64_t, int32_t> take(int64_t room) {
    room = used_.at_or_after(room);
    if (room < 0) return {-1, -1};
    const int32_t bin = head_[room];
    head_[room] = next_[bin];
    if (head_[room] < 0) used_.clear(room);
    return {room, bin};
  }

 private:
  std::vector<int32_t> head_, next_;
  BitmapTree used_;
};

// The same for budgets too large for one bucket per length.
class SortedBins {
 public:
  void put(int64_t room, int32_t bin) { bins_[room].push_back(bin); }
  std::pair<int64_t, int32_t> take(int64_t room) {
    const auto found = bins_.lower_bound(room);
    if (found == bins_.end()) return {-1, -1};
    const std::pair<int64_t, int32_t> out{found->first, found->second.back()};
    found->second.pop_back();
    if (found->second.empty()) bins_.erase(found);
    return out;
  }

 private:
  std::map<int64_t, std::vector<int32_t>> bins_;
};

// Items from longest to shortest, equals in order of index.
std::vector<int64_t> longest_first(const int64_t* lengths, int64_t n) {
  std::vector<int64_t> order(n);
  const int64_t longest = n ? *std::max_element(lengths, lengths + n) : 0;
  if (longest > kMaxCountedLength) {
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    return order;
  }
  std::vector<int64_t> first(longest + 2);  // first[longest - length]: where items of this length go
  for (int64_t i = 0; i < n; ++i) ++first[longest - lengths[i] + 1];
  for (int64_t d = 0; d <= longest; ++d) first[d + 1] += first[d];
  for (int64_t i = 0; i < n; ++i) order[first[longest - lengths[i]]++] = i;
  return order;
}

using BinOf = std::vector<int32_t>;  // bin of each item

template <typename Bins>
int32_t best_fit_decreasing(const PacksInput& in, Bins bins, BinOf& bin_of) {
  std::vector<int64_t> count(in.num_items);
  int32_t opened = 0;
  for (const int64_t item : longest_first(in.lengths, in.num_items)) {
    auto [room, bin] = bins.take(in.lengths[item]);
    if (bin < 0) room = in.budgets[0], bin = opened++;
    bin_of[item] = bin;
    if (++count[bin] < in.max_items) bins.put(room - in.lengths[item], bin);
  }
  return opened;
}

int32_t first_fit_decreasing(const PacksInput& in, BinOf& bin_of) {
  // Leaves hold the room of each bin, -1 when it is closed; bins not opened yet have the whole budget.
  const auto leaves = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(in.num_items, 1))));
  std::vector<int64_t> room(2 * leaves, in.budgets[0]), count(in.num_items);
  int32_t opened = 0;
  for (const int64_t item : longest_first(in.lengths, in.num_items)) {
    int64_t node = 1;
    while (node < leaves) node = 2 * node + (room[2 * node] < in.lengths[item] ? 1 : 0);
    const auto bin = static_cast<int32_t>(node - leaves);
    bin_of[item] = bin;
    opened = std::max(opened, bin + 1);
    room[node] = ++count[bin] < in.max_items ? room[node] - in.lengths[item] : -1;
    while (node /= 2) room[node] = std::max(room[2 * node], room[2 * node + 1]);
  }
  return opened;
}

// Any number of budgets, at most `max_open` bins open: each item goes to the bin that it leaves fullest (or to the
// first where it fits); when it fits nowhere, the fullest bin is closed to make place for a new one.
int32_t scan_fit(const PacksInput& in, const std::vector<int64_t>& order, size_t max_open, bool first, BinOf& bin_of) {
  struct Bin {
    int32_t id;
    int64_t count;
    std::vector<int64_t> room;
  };
  const int64_t K = in.num_budgets;
  std::vector<Bin> open;
  int32_t opened = 0;
  const auto left = [&](const Bin& bin, const int64_t* lengths) {  // summed over budgets, as shares of them
    double sum = 0;
    for (int64_t k = 0; k < K; ++k)
      sum += static_cast<double>(bin.room[k] - (lengths ? lengths[k] : 0)) / static_cast<double>(in.budgets[k]);
    return sum;
  };
  for (const int64_t item : order) {
    const int64_t* lengths = in.lengths + item * K;
    size_t chosen = open.size();
    double least = std::numeric_limits<double>::infinity();
    for (size_t i = 0; i < open.size(); ++i) {
      bool fits = true;
      for (int64_t k = 0; k < K; ++k) fits = fits && lengths[k] <= open[i].room[k];
      if (!fits) continue;
      if (const double score = first ? 0.0 : left(open[i], lengths); score < least) least = score, chosen = i;
      if (first) break;
    }
    if (chosen == open.size()) {
      if (open.size() == max_open) {
        open.erase(std::min_element(open.begin(), open.end(),
                                    [&](const Bin& a, const Bin& b) { return left(a, nullptr) < left(b, nullptr); }));
      }
      chosen = open.size();
      open.push_back({opened++, 0, std::vector<int64_t>(in.budgets, in.budgets + K)});
    }
    Bin& bin = open[chosen];
    bin_of[item] = bin.id;
    for (int64_t k = 0; k < K; ++k) bin.room[k] -= lengths[k];
    if (++bin.count == in.max_items) open.erase(open.begin() + static_cast<int64_t>(chosen));
  }
  return opened;
}

// Largest share of any budget first, equals in order of index.
std::vector<int64_t> largest_share_first(const PacksInput& in) {
  std::vector<double> share(in.num_items);
  for (int64_t i = 0; i < in.num_items; ++i)
    for (int64_t k = 0; k < in.num_budgets; ++k)
      share[i] = std::max(share[i],
                          static_cast<double>(in.lengths[i * in.num_budgets + k]) / static_cast<double>(in.budgets[k]));
  std::vector<int64_t> order(in.num_items);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return share[a] > share[b]; });
  return order;
}

int32_t assign_bins(const PacksInput& in, BinOf& bin_of) {
  if (in.policy == Policy::kStream) {
    std::vector<int64_t> arrival(in.num_items);
    std::iota(arrival.begin(), arrival.end(), int64_t{0});
    return scan_fit(in, arrival, kOpenBinsStream, false, bin_of);
  }
  if (in.num_budgets > 1)
    return scan_fit(in, largest_share_first(in), kOpenBinsSorted, in.policy == Policy::kFirstFit, bin_of);
  if (in.policy == Policy::kFirstFit) return first_fit_decreasing(in, bin_of);
  if (in.budgets[0] > kMaxBuckets) return best_fit_decreasing(in, SortedBins{}, bin_of);
  return best_fit_decreasing(in, BucketedBins(in.budgets[0], in.num_items), bin_of);
}

}  // namespace

Packs plan_packs(const PacksInput& in) {
  if (in.num_items > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("plan_packs: lengths has more than 2**31 - 1 items");
  for (int64_t i = 0; i < in.num_items * in.num_budgets; ++i)
    if (in.lengths[i] < 0 || in.lengths[i] > in.budgets[i % in.num_budgets])
      throw std::invalid_argument("plan_packs: lengths must lie between 0 and their budget");
  BinOf bin_of(in.num_items);
  const int32_t opened = assign_bins(in, bin_of);

  Packs packs;
  packs.offsets.resize(opened + 1);
  packs.order.resize(in.num_items);
  for (const int32_t bin : bin_of) ++packs.offsets[bin + 1];
  std::partial_sum(packs.offsets.begin(), packs.offsets.end(), packs.offsets.begin());
  std::vector<int64_t> next(packs.offsets.begin(), packs.offsets.end() - 1);
  for (int64_t i = 0; i < in.num_items; ++i) packs.order[next[bin_of[i]]++] = i;
  return packs;
}

}  // namespace mm::planner
