// Items over ranks so that no rank has much more to do than another.   n items, R ranks, K costs
#include "ranks.h"

#include <algorithm>
#include <limits>
#include <queue>
#include <utility>

namespace mm::planner {
namespace {

constexpr int64_t kMaxTrials = int64_t{1} << 24;  // pairs looked at when improving; with many items there is no need
constexpr double kInfinity = std::numeric_limits<double>::infinity();

class Ranks {
 public:
  explicit Ranks(const RanksInput& in)
      : in_(in), K_(in.num_costs), rank_(in.num_items), count_(in.num_ranks), load_(in.num_ranks * in.num_costs) {}

  void give_out() {
    if (K_ == 1 && !in_.equal_count) {
      give_out_by_heap();
      return;
    }
    const int64_t floor = in_.num_items / in_.num_ranks;
    int64_t larger = in_.num_items % in_.num_ranks;  // ranks that may still take one more than the others
    for (int64_t step = 0; step < in_.num_items; ++step) {
      const int64_t item = in_.order[step];
      int64_t chosen = 0;
      double least = kInfinity;
      for (int64_t r = 0; r < in_.num_ranks; ++r) {
        if (in_.equal_count && count_[r] >= floor + (larger > 0 ? 1 : 0)) continue;
        if (const double load = load_with(r, cost(item), 1.0); load < least) least = load, chosen = r;
      }
      put(item, chosen);
      if (in_.equal_count && count_[chosen] == floor + 1) --larger;
    }
  }

  void improve() {
    int64_t trials = 0;
    std::vector<int64_t> mine;
    while (true) {
      int64_t heaviest = 0;
      for (int64_t r = 1; r < in_.num_ranks; ++r)
        if (load(r) > load(heaviest)) heaviest = r;
      mine.clear();
      for (int64_t i = 0; i < in_.num_items; ++i)
        if (rank_[i] == heaviest) mine.push_back(i);
      trials += std::ssize(mine) * in_.num_items;
      if (trials > kMaxTrials) return;

      double best = load(heaviest);
      int64_t away = -1, back = -1, to = -1;
      if (!in_.equal_count) {
        for (const int64_t i : mine) {
          const double here = load_with(heaviest, cost(i), -1.0);
          for (int64_t r = 0; r < in_.num_ranks; ++r) {
            if (r == heaviest) continue;
            const double greater = std::max(here, load_with(r, cost(i), 1.0));
            if (greater < best) best = greater, away = i, back = -1, to = r;
          }
        }
      }
      for (const int64_t i : mine) {
        for (int64_t j = 0; j < in_.num_items; ++j) {
          if (rank_[j] == heaviest) continue;
          const double greater = load_after_swap(heaviest, rank_[j], cost(i), cost(j), best);
          if (greater < best) best = greater, away = i, back = j, to = rank_[j];
        }
      }
      if (away < 0) return;
      move(away, heaviest, to);
      if (back >= 0) move(back, to, heaviest);
    }
  }

  std::vector<int64_t> take() && { return std::move(rank_); }

 private:
  const double* cost(int64_t item) const { return in_.costs + item * K_; }
  double load(int64_t r) const { return *std::max_element(&load_[r * K_], &load_[r * K_] + K_); }
  double load_with(int64_t r, const double* cost, double sign) const {
    double most = -kInfinity;
    for (int64_t k = 0; k < K_; ++k) most = std::max(most, load_[r * K_ + k] + sign * cost[k]);
    return most;
  }
  // The greater load of two ranks after they swap items; anything >= bound once it is known to pass it.
  double load_after_swap(int64_t a, int64_t b, const double* from_a, const double* from_b, double bound) const {
    double most = -kInfinity;
    for (int64_t k = 0; k < K_ && most < bound; ++k) {
      const double change = from_a[k] - from_b[k];
      most = std::max({most, load_[a * K_ + k] - change, load_[b * K_ + k] + change});
    }
    return most;
  }
  void put(int64_t item, int64_t r) {
    rank_[item] = r;
    ++count_[r];
    for (int64_t k = 0; k < K_; ++k) load_[r * K_ + k] += cost(item)[k];
  }
  void move(int64_t item, int64_t from, int64_t to) {
    --count_[from];
    for (int64_t k = 0; k < K_; ++k) load_[from * K_ + k] -= cost(item)[k];
    put(item, to);
  }
  // One cost: the least loaded rank is the one whose load then is least.
  void give_out_by_heap() {
    using Entry = std::pair<double, int64_t>;  // load, rank
    std::vector<Entry> all(in_.num_ranks);
    for (int64_t r = 0; r < in_.num_ranks; ++r) all[r] = {0.0, r};
    std::priority_queue<Entry, std::vector<Entry>, std::greater<>> least(std::greater<>(), std::move(all));
    for (int64_t step = 0; step < in_.num_items; ++step) {
      const int64_t r = least.top().second;
      least.pop();
      put(in_.order[step], r);
      least.push({load_[r], r});
    }
  }

  const RanksInput& in_;
  const int64_t K_;
  std::vector<int64_t> rank_, count_;
  std::vector<double> load_;  // [R, K]
};

}  // namespace

std::vector<int64_t> balance_ranks(const RanksInput& in) {
  Ranks ranks(in);
  ranks.give_out();
  ranks.improve();
  return std::move(ranks).take();
}

}  // namespace mm::planner
