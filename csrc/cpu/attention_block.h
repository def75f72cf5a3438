// Blocks of attention scores: which parts are seen, masks, biases, dropout.
// For attention_kernels.h alone, which is compiled once per instruction set.
#pragma once

#include "attention_rows.h"

namespace mm::cpu::attention::MM_ISA {

constexpr int64_t kBand = 12;             // rows of a band: what is skipped or masked is decided per band and panel
constexpr int64_t kWideBand = 4 * kBand;  // where all rows see the same keys: fewer passes over the operands
constexpr int64_t kMaxBlock = 256;        // keys of a block at most
constexpr int64_t kMaxPanels = kMaxBlock / kPanel;
static_assert(kBand % kRows == 0 && kMaxBlock % kPanel == 0);

// Floats left free between the rows of a buffer: rows a power of two apart would share a few sets of the cache.
constexpr int64_t kRowGap = 16;

// A float buffer cut up front to back; every part starts at a cache line.
struct Scratch {
  float* next;
  int64_t used = 0;
  float* take(int64_t count) {
    const int64_t rounded = round_up(count, 16);
    float* part = next == nullptr ? nullptr : next + used;
    used += rounded;
    return part;
  }
};

// Pairs of queries [begin, end) and keys [key_begin, key_end) within the queries' bounds.
inline int64_t pairs_between(const Inputs& in, int64_t begin, int64_t end, int64_t key_begin, int64_t key_end) {
  int64_t pairs = 0;
  for (int64_t i = begin; i < end; ++i) pairs += most(0, least(in.kv_hi[i], key_end) - most(in.kv_lo[i], key_begin));
  return pairs;
}

// Keys of a block in panels.  Where modalities decide who sees a key, a panel ends at a change of them, so that most
// are seen whole or not at all.   Panel p has the columns from p kPanel on, of scores and of operands.
struct Keys {
  int64_t panels = 0;
  int64_t first[kMaxPanels + 1];  // key of each panel, then the end
  uint32_t bits[kMaxPanels];      // of any key of the panel

  int64_t begin() const { return first[0]; }
  int64_t end() const { return first[panels]; }
  int64_t width(int64_t p) const { return first[p + 1] - first[p]; }
  int64_t key(int64_t column) const { return first[column / kPanel] + column % kPanel; }
};

constexpr int64_t kLeastKeys = 8;  // of a panel that ends at a change: each takes a vector, however few its keys

inline int64_t panel_end(const Inputs& in, int64_t begin, int64_t end) {
  end = least(begin + kPanel, end);
  for (int64_t j = begin + kLeastKeys; in.has_visible && j < end; ++j)
    if (in.k_bits[j] != in.k_bits[j - 1]) return j;
  return end;
}

// At most so many panels of the keys [begin, end).
inline Keys keys_of(const Inputs& in, int64_t begin, int64_t end, int64_t panels) {
  Keys keys;
  for (keys.first[0] = begin; keys.end() < end && keys.panels < panels; ++keys.panels)
    keys.first[keys.panels + 1] = panel_end(in, keys.end(), end);
  for (int64_t p = 0; in.has_visible && p < keys.panels; ++p) {
    keys.bits[p] = 0;
    for (int64_t j = keys.first[p]; j < keys.first[p + 1]; ++j) keys.bits[p] |= static_cast<uint32_t>(in.k_bits[j]);
  }
  return keys;
}

// The panels of a block, where [begin, end) is cut into blocks of as equal numbers of them, `most` at most.
inline int64_t panels_of_block(const Inputs& in, int64_t begin, int64_t end, int64_t most) {
  int64_t panels = 0;
  for (int64_t j = begin; j < end; j = panel_end(in, j, end)) ++panels;
  const int64_t blocks = (panels + most - 1) / most;
  return blocks ? (panels + blocks - 1) / blocks : 0;
}

constexpr int64_t kLeastQueries = 4;  // of a band that ends at a change
static_assert(kLeastQueries % kTerms == 0);

// Where a band of queries ends.  Equal bands up to a query that sees other modalities than the first, in whole words.
inline int64_t band_end(const Inputs& in, int64_t begin, int64_t end, int64_t most) {
  int64_t same = in.has_visible ? least(begin + kLeastQueries, end) : end;
  while (same < end && in.q_bits[same] == in.q_bits[begin] &&
         in.q_bits[least(same + kTerms, end) - 1] == in.q_bits[begin])
    same = least(same + kTerms, end);
  const int64_t count = same - begin, bands = (count + most - 1) / most;
  return least(begin + round_up((count + bands - 1) / bands, kTerms), same);
}

// What some row of a band sees of a block, in stretches of columns that touch, and which panels need a mask.
struct Seen {
  struct Stretch {
    int64_t begin, end;  // columns; the end is that of the last key, not of its vector
    int64_t vecs() const { return (end - begin + W - 1) / W; }
  };
  int64_t stretches = 0;
  Stretch stretch[kMaxPanels];
  bool any_masked = false;
  bool masked[kMaxPanels];
  int64_t width[kMaxPanels];  // seen columns of each panel, from its first on
};

// Rows [begin, end) of queries against a block; both bounds rise with the row.
inline void find_seen(const Inputs& in, int64_t begin, int64_t end, const Keys& keys, Seen& seen) {
  const int64_t lo = in.kv_lo[begin], hi = in.kv_hi[end - 1];          // seen by some row
  const int64_t all_lo = in.kv_lo[end - 1], all_hi = in.kv_hi[begin];  // by every row
  uint32_t any = 0, all = ~uint32_t{0};
  for (int64_t i = begin; in.has_visible && i < end; ++i) {
    any |= static_cast<uint32_t>(in.q_bits[i]);
    all &= static_cast<uint32_t>(in.q_bits[i]);
  }
  seen.stretches = 0;
  seen.any_masked = false;
  for (int64_t p = 0; p < keys.panels; ++p) {
    const int64_t from = keys.first[p], to = least(keys.first[p + 1], hi), column = p * kPanel;
    const bool active = from < to && keys.first[p + 1] > lo && (!in.has_visible || (any & keys.bits[p]) != 0);
    seen.width[p] = active ? to - from : 0;
    seen.masked[p] = active && !(from >= all_lo && to <= all_hi && (!in.has_visible || (keys.bits[p] & ~all) == 0));
    if (!active) continue;
    seen.any_masked |= seen.masked[p];
    if (p > 0 && seen.width[p - 1] == kPanel) {
      seen.stretch[seen.stretches - 1].end = column + seen.width[p];
    } else {
      seen.stretch[seen.stretches++] = {column, column + seen.width[p]};
    }
  }
}

// scores[j] = -inf where query i does not see the key of column j, in the masked panels.
inline void mask_row(const Inputs& in, int64_t i, const Keys& keys, const Seen& seen, float* scores) {
  int32_t bits[W];
  const I lanes = lane_numbers();
  const V nothing = splat(-kInfinity);
  for (int64_t p = 0; p < keys.panels; ++p) {
    if (!seen.masked[p]) continue;
    const int64_t to = keys.first[p] + seen.width[p];
    float* at = scores + p * kPanel;
    for (int64_t j = keys.first[p]; j < to; j += W, at += W) {
      const int32_t lo = in.kv_lo[i] - static_cast<int32_t>(j), hi = in.kv_hi[i] - static_cast<int32_t>(j);
      I visible = (lanes >= splat(lo)) & (lanes < splat(hi));
      if (in.has_visible) {
        I of_key{};
        if (to - j >= W) {
          of_key = load(in.k_bits + j);
        } else {
          for (int64_t l = 0; l < W; ++l) bits[l] = l < to - j ? in.k_bits[j + l] : 0;
          of_key = load(bits);
        }
        visible &= (of_key & splat(in.q_bits[i])) != splat(0);
      }
      store(at, select(visible, load(at), nothing));
    }
  }
}

// The lanes between the last key of a stretch and the end of its vector, where the product is of zeros.
MM_INLINE void close_row(const Seen::Stretch& s, float* scores) {
  const int64_t rest = (s.end - s.begin) % W;
  if (rest == 0) return;
  // A vector as a whole: a load of what was stored piece by piece waits until all pieces have left the store buffer.
  float* last = scores + s.end - rest;
  store(last, select(lane_numbers() < splat(static_cast<int32_t>(rest)), load(last), splat(-kInfinity)));
}

// bias_rows[m ld + j]: what a query of modality m adds to the score of column j of the block.
inline void read_bias(const Inputs& in, int64_t head, const Keys& keys, float* rows, int64_t ld) {
  for (int64_t m = 0; m < in.Mq; ++m) {
    const float* bias = in.bias + (head * in.Mq + m) * in.Mk;
    for (int64_t p = 0; p < keys.panels; ++p) {
      float* row = rows + m * ld + p * kPanel;
      for (int64_t j = 0; j < keys.width(p); ++j) row[j] = bias[in.k_modality[keys.first[p] + j]];
      for (int64_t j = keys.width(p); j < round_up(keys.width(p), W); ++j) row[j] = 0.0f;
    }
  }
}

MM_INLINE void add_bias(const Seen::Stretch& s, const float* bias, float* scores) {
  for (int64_t j = s.begin; j < s.end; j += W) store(scores + j, load(scores + j) + load(bias + j));
}

// What read_keep writes to for `count` keys: whole vectors of counters, the first of which may begin 3 keys early.
constexpr int64_t keep_floats(int64_t count) { return round_up(count, W) + 4 * W + 4; }

// keep[j] = keep_scale where the probability of query i and key begin + j is kept, else 0; up to a whole vector.
// Returns where in the buffer that is.
inline const float* read_keep(const Inputs& in, int64_t head, int64_t i, int64_t begin, int64_t count, float* buffer) {
  uint32_t counter[W];
  for (int l = 0; l < W; ++l) counter[l] = static_cast<uint32_t>(l);
  U lanes;
  std::memcpy(&lanes, counter, sizeof(lanes));
  const int64_t first = begin / 4, last = (begin + round_up(count, W) + 3) / 4;  // four keys to a counter
  for (int64_t quad = first; quad < last; quad += W) {
    U words[4];
    philox(lanes + static_cast<uint32_t>(quad), splat(static_cast<uint32_t>(i)), splat(static_cast<uint32_t>(head)),
           splat(in.offset), in.seed[0], in.seed[1], words);
    uint32_t word[4][W];
    std::memcpy(word, words, sizeof(word));
    float* to = buffer + 4 * (quad - first);
    for (int l = 0; l < W; ++l)
      for (int r = 0; r < 4; ++r) to[4 * l + r] = word[r][l] >= in.threshold ? in.keep_scale : 0.0f;
  }
  return buffer + begin % 4;
}

// Calls body(modality, begin, end) for the runs of keys of one modality in columns [begin, end) of a block.
template <typename Body>
MM_INLINE void for_each_modality(const Inputs& in, const Keys& keys, const Seen::Stretch& s, const Body& body) {
  const int32_t* modality = in.k_modality + keys.key(s.begin) - s.begin;
  for (int64_t j = s.begin; j < s.end;) {
    int64_t next = j + 1;
    while (next < s.end && modality[next] == modality[j]) ++next;
    body(modality[j], j, next);
    j = next;
  }
}

// A chain of additions per lane, then the lanes, then what is left: always in this order.
MM_INLINE float sum_of(const float* x, int64_t begin, int64_t end) {
  V sums{};
  int64_t j = begin;
  for (; j + W <= end; j += W) sums += load(x + j);
  float total = sum(sums);
  for (; j < end; ++j) total += x[j];
  return total;
}

}  // namespace mm::cpu::attention::MM_ISA
