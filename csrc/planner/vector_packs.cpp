// Packing items into bins under several budgets at once.   n items, K budgets
#include "vector_packs.h"

#include <algorithm>
#include <iterator>
#include <limits>

namespace mm::planner {
namespace {

constexpr int64_t kPool = 2048;    // items that a round brings; up to half as many are left over for the next
constexpr int64_t kChoices = 128;  // items that fit, largest first, among which a place in a bin is given
constexpr double kInfinity = std::numeric_limits<double>::infinity();

bool fits(const int64_t* lengths, const int64_t* room, int64_t K) {
  for (int64_t k = 0; k < K; ++k)
    if (lengths[k] > room[k]) return false;
  return true;
}

// Items not packed yet, largest first, their lengths side by side: the scan reads nothing else.
struct Pool {
  std::vector<int64_t> item, lengths;  // [m], [m, K]
  std::vector<double> size;            // [m]
  std::vector<uint8_t> gone;           // [m]
  int64_t left = 0;

  int64_t slots() const { return std::ssize(item); }
  void fill(const VectorPacksInput& in, const double* sizes, std::vector<int64_t> items) {
    item = std::move(items);
    left = slots();
    gone.assign(left, 0);
    size.resize(left);
    lengths.resize(left * in.num_budgets);
    for (int64_t j = 0; j < left; ++j) {
      size[j] = sizes[item[j]];
      std::copy_n(in.lengths + item[j] * in.num_budgets, in.num_budgets, &lengths[j * in.num_budgets]);
    }
  }
  std::vector<int64_t> remaining() const {
    std::vector<int64_t> out;
    for (int64_t j = 0; j < slots(); ++j)
      if (!gone[j]) out.push_back(item[j]);
    return out;
  }
};

// Fills one bin from the pool, where nothing is left before `first`.
void fill_bin(const VectorPacksInput& in, const double* weights, Pool& pool, int64_t& first, int64_t bin,
              std::vector<int64_t>& room, int64_t* bin_of) {
  const int64_t K = in.num_budgets;
  std::copy_n(in.budgets, K, room.begin());
  while (first < pool.slots() && pool.gone[first]) ++first;
  int64_t start = first;
  for (int64_t count = 0; count < in.max_items && pool.left > 0; ++count) {
    double most = 0;  // no larger item fits; the margin covers rounding
    for (int64_t k = 0; k < K; ++k) most += weights[k] * static_cast<double>(room[k]);
    while (start < pool.slots() && (pool.gone[start] || pool.size[start] > most * (1 + 1e-9))) ++start;
    int64_t best = -1, seen = 0;
    double least = kInfinity;
    for (int64_t j = start; j < pool.slots() && seen < kChoices; ++j) {
      const int64_t* lengths = &pool.lengths[j * K];
      if (pool.gone[j] || !fits(lengths, room.data(), K)) continue;
      ++seen;
      double score = 0;
      for (int64_t k = 0; k < K; ++k) {
        const double left = static_cast<double>(room[k] - lengths[k]) * in.scales[k];
        score += left * left;
      }
      if (score < least) least = score, best = j;
    }
    if (best < 0) return;
    for (int64_t k = 0; k < K; ++k) room[k] -= pool.lengths[best * K + k];
    pool.gone[best] = 1;
    --pool.left;
    bin_of[pool.item[best]] = bin;
  }
}

}  // namespace

int64_t pool_fit(const VectorPacksInput& in, const double* sizes, const double* weights, int64_t* bin_of) {
  // Every rounds-th item is in one round, so that each round sees the mix of all; what is hard to place goes on.
  const int64_t n = in.num_items, rounds = std::max<int64_t>(1, (n + kPool / 2) / kPool);
  std::vector<int64_t> room(in.num_budgets);
  Pool pool;
  int64_t bins = 0;
  for (int64_t round = 0; round < rounds; ++round) {
    std::vector<int64_t> fresh, items;
    for (int64_t i = round; i < n; i += rounds) fresh.push_back(i);
    const std::vector<int64_t> rest = pool.remaining();
    std::merge(rest.begin(), rest.end(), fresh.begin(), fresh.end(), std::back_inserter(items));
    pool.fill(in, sizes, std::move(items));
    const int64_t keep = round + 1 < rounds ? kPool / 2 : 0;
    int64_t first = 0;
    while (pool.left > keep) {
      fill_bin(in, weights, pool, first, bins++, room, bin_of);
      if (2 * pool.left < pool.slots()) {
        pool.fill(in, sizes, pool.remaining());
        first = 0;
      }
    }
  }
  return bins;
}

std::vector<int64_t> scan_fit(const VectorPacksInput& in, OpenBins& open, int64_t max_open, bool first,
                              int64_t* bin_of) {
  const int64_t K = in.num_budgets;
  std::vector<int64_t> closed;
  const auto close = [&](int64_t b) {
    closed.push_back(open.ids[b]);
    open.ids.erase(open.ids.begin() + b);
    open.counts.erase(open.counts.begin() + b);
    open.room.erase(open.room.begin() + b * K, open.room.begin() + (b + 1) * K);
  };
  const auto left = [&](int64_t b, const int64_t* lengths) {
    double sum = 0;
    for (int64_t k = 0; k < K; ++k) sum += static_cast<double>(open.room[b * K + k] - lengths[k]) * in.scales[k];
    return sum;
  };
  for (int64_t i = 0; i < in.num_items; ++i) {
    const int64_t* lengths = in.lengths + i * K;
    int64_t chosen = -1;
    double least = kInfinity;
    for (int64_t b = 0; b < std::ssize(open.ids); ++b) {
      if (!fits(lengths, &open.room[b * K], K)) continue;
      if (const double score = first ? 0.0 : left(b, lengths); score < least) least = score, chosen = b;
      if (first) break;
    }
    if (chosen < 0) {
      if (std::ssize(open.ids) == max_open) {
        int64_t fullest = 0;  // of several budgets the oldest: one may be used up in a bin that is empty by the others
        for (int64_t b = 1; K == 1 && b < max_open; ++b)
          if (open.room[b] < open.room[fullest]) fullest = b;
        close(fullest);
      }
      chosen = std::ssize(open.ids);
      open.ids.push_back(open.next_id++);
      open.counts.push_back(0);
      open.room.insert(open.room.end(), in.budgets, in.budgets + K);
    }
    bin_of[i] = open.ids[chosen];
    for (int64_t k = 0; k < K; ++k) open.room[chosen * K + k] -= lengths[k];
    if (++open.counts[chosen] == in.max_items) close(chosen);
  }
  return closed;
}

}  // namespace mm::planner
