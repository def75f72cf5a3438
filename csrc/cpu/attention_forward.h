// Forward: one tile of queries of one head against the keys it sees, with a running softmax.
// For attention_kernels.h alone, which is compiled once per instruction set.
#pragma once

#include "attention_block.h"
#include "attention_gemm.h"

namespace mm::cpu::attention::MM_ISA {

constexpr int kTogether = 4;  // rows of a softmax: a row alone waits for its maximum, and again for its sum

// Columns of a block: as many as leave K, V and the tile's rows room in the second-level cache.
MM_INLINE int64_t forward_block(int64_t D) { return D <= 64 ? 256 : D <= 128 ? 128 : 64; }

// All that a tile keeps while it walks over its keys.   n rows
struct ForwardTile {
  const Forward& f;
  int64_t begin, n, head, padded, block, ld_scores, ld_value, band;
  int64_t depth, ld_query;                        // words of a row, and up to a whole vector
  bool fresh;                                     // `out` holds nothing yet
  float *query, *out, *row_max, *row_sum, *mass;  // [n, ld_query], [n, padded], [n] twice, [n, Mk]
  float *rows, *key, *value, *scores, *bias, *keep;
  Ahead ahead;

  ForwardTile(const Forward& forward, int64_t tile_rows, Scratch& scratch) : f(forward), ahead(forward.in) {
    const int64_t D = f.in.D;
    padded = round_up(D, W);
    depth = words(D);
    ld_query = round_up(depth, W);
    block = forward_block(D);
    ld_scores = block + kRowGap;
    ld_value = padded + kRowGap;
    query = scratch.take(tile_rows * ld_query);
    out = scratch.take(tile_rows * padded);
    row_max = scratch.take(tile_rows);
    row_sum = scratch.take(tile_rows);
    mass = f.mass ? scratch.take(tile_rows * f.in.Mk) : nullptr;
    rows = scratch.take(kPanel * ld_value);
    key = scratch.take(block * depth);
    value = scratch.take(words(block) * ld_value);
    scores = scratch.take(kWideBand * ld_scores);
    bias = f.in.bias ? scratch.take(f.in.Mq * ld_scores) : nullptr;
    keep = f.in.dropout ? scratch.take(keep_floats(block)) : nullptr;
  }

  void start(int64_t first, int64_t count, int64_t h) {
    const Inputs& in = f.in;
    begin = first;
    n = count;
    head = h;
    fresh = true;
    const bool same = in.kv_lo[begin] == in.kv_lo[begin + n - 1] &&
                      in.kv_hi[begin] == in.kv_hi[begin + n - 1];  // both rise with the row
    band = same ? kWideBand : kBand;
    read_queries(in, begin, n, head, query, ld_query);
    for (int64_t i = 0; i < n; ++i) row_max[i] = -kInfinity, row_sum[i] = 0.0f;
    if (mass) std::memset(mass, 0, sizeof(float) * n * in.Mk);
  }

  void attend(const Keys& keys) {
    const Inputs& in = f.in;
    const int64_t kv_head = head / in.group();
    for (int64_t p = 0; p < keys.panels; ++p) {
      read_words(in, in.k, keys.first[p], keys.width(p), kv_head, rows, ld_value);
      transpose_rows(rows, ld_value, keys.width(p), depth, key + p * kPanel * depth);
    }
    for (int64_t p = 0; p < keys.panels; ++p)
      read_woven(in, in.v, keys.first[p], keys.width(p), kv_head, value + words(p * kPanel) * ld_value, ld_value);
    if (bias) read_bias(in, head, keys, bias, ld_scores);
    for (int64_t i = 0, next; i < n; i = next) {
      next = band_end(in, begin + i, begin + n, band) - begin;
      attend_band(keys, i, next - i);
    }
    fresh = false;
  }

  void clear(int64_t first, int64_t rows) { std::memset(out + first * padded, 0, sizeof(float) * rows * padded); }

  // Another tile's rows.
  void look_ahead(int64_t tile, int64_t h) {
    const int32_t* bounds = f.tiles + 4 * tile;
    if (bounds[2] < bounds[3]) {
      const int64_t begin = f.spans[3 * bounds[2]], end = f.spans[3 * bounds[3] - 2];
      ahead.add(f.in.k, begin, end, h / f.in.group());
      ahead.add(f.in.v, begin, end, h / f.in.group());
    }
    ahead.add(f.in.q, bounds[0], bounds[1], h);
    ahead.add(f.out, bounds[0], bounds[1], h);
    ahead.spread(2 * pairs_between(f.in, begin, begin + n, 0, f.in.Tk));
  }

  void attend_band(const Keys& keys, int64_t first, int64_t rows_here) {
    const Inputs& in = f.in;
    Seen seen;
    find_seen(in, begin + first, begin + first + rows_here, keys, seen);
    if (seen.stretches == 0) {
      if (fresh) clear(first, rows_here);
      return;
    }
    for (int64_t s = 0; s < seen.stretches; ++s) {
      const Seen::Stretch& at = seen.stretch[s];
      multiply<false, false>(rows_here, at.vecs(), depth, query + first * ld_query, ld_query, key + at.begin * depth,
                             kPanel, kPanel * depth, scores + at.begin, ld_scores, scale_left(in), ahead);
    }
    int64_t done = 0;
    for (; done + kTogether <= rows_here; done += kTogether)
      softmax_rows<kTogether>(keys, seen, first + done, scores + done * ld_scores);
    for (; done < rows_here; ++done) softmax_rows<1>(keys, seen, first + done, scores + done * ld_scores);
    for (int64_t s = 0; s < seen.stretches; ++s) {
      const Seen::Stretch& at = seen.stretch[s];
      const auto product = fresh && s == 0 ? multiply<false, false> : multiply<false, true>;
      product(rows_here, padded / W, words(at.end - at.begin), scores + words(at.begin), ld_scores,
              value + words(at.begin) * ld_value, ld_value, kPanel, out + first * padded, padded, 1.0f, ahead);
    }
  }

  // Scores to probabilities times e^(row maximum), and the rows' sums so far to the new maxima.
  template <int ROWS>
  void softmax_rows(const Keys& keys, const Seen& seen, int64_t row, float* x) {
    const Inputs& in = f.in;
    const auto scores_of = [&](int r) { return x + r * ld_scores; };
    V maxima[ROWS], sums[ROWS] = {};
    float top[ROWS], base[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      maxima[r] = splat(-kInfinity);
      if (seen.any_masked) mask_row(in, begin + row + r, keys, seen, scores_of(r));
    }
    for (int64_t s = 0; s < seen.stretches; ++s) {
      const Seen::Stretch& at = seen.stretch[s];
      for (int r = 0; r < ROWS; ++r) {
        close_row(at, scores_of(r));
        if (bias) add_bias(at, bias + in.q_modality[begin + row + r] * ld_scores, scores_of(r));
      }
      for (int64_t j = at.begin; j < at.end; j += W)
        for (int r = 0; r < ROWS; ++r) maxima[r] = larger(load(scores_of(r) + j), maxima[r]);
    }
    for (int r = 0; r < ROWS; ++r) {
      const float found = largest(maxima[r]), before = row_max[row + r];
      top[r] = found > before ? found : before;
      base[r] = top[r] == -kInfinity ? 0.0f : top[r];  // nothing seen yet: every exponent is -inf
    }
    for (int64_t s = 0; s < seen.stretches; ++s)
      for (int64_t j = seen.stretch[s].begin; j < seen.stretch[s].end; j += W)
        for (int r = 0; r < ROWS; ++r) {
          const V p = exp(load(scores_of(r) + j) - base[r]);
          store(scores_of(r) + j, p);
          sums[r] += p;
        }
    for (int r = 0; r < ROWS; ++r) {
      const float before = row_max[row + r];
      if (top[r] != before && before != -kInfinity) rescale(row + r, exp(splat(before - base[r]))[0]);
      row_max[row + r] = top[r];
      row_sum[row + r] += sum(sums[r]);
      if (mass) add_mass(keys, seen, row + r, scores_of(r));
      if (keep) drop(keys, seen, row + r, scores_of(r));
      for (int64_t s = 0; s < seen.stretches; ++s)
        narrow_in_place(scores_of(r), seen.stretch[s].begin, seen.stretch[s].end);
    }
  }

  void rescale(int64_t row, float factor) {
    row_sum[row] *= factor;
    float* o = out + row * padded;
    for (int64_t d = 0; d < padded; d += W) store(o + d, load(o + d) * factor);
    for (int64_t m = 0; mass && m < f.in.Mk; ++m) mass[row * f.in.Mk + m] *= factor;
  }

  void add_mass(const Keys& keys, const Seen& seen, int64_t row, const float* p) {
    for (int64_t s = 0; s < seen.stretches; ++s)
      for_each_modality(f.in, keys, seen.stretch[s], [&](int32_t modality, int64_t from, int64_t to) {
        mass[row * f.in.Mk + modality] += sum_of(p, from, to);
      });
  }

  void drop(const Keys& keys, const Seen& seen, int64_t row, float* p) {
    for (int64_t s = 0; s < seen.stretches; ++s) {
      const Seen::Stretch& at = seen.stretch[s];
      const float* kept = read_keep(f.in, head, begin + row, keys.key(at.begin), at.end - at.begin, keep);
      for (int64_t j = 0; j < at.end - at.begin; j += W)
        store(p + at.begin + j, load(p + at.begin + j) * load(kept + j));
    }
  }

  void finish() {
    if (fresh) clear(0, n);
    for (int64_t i = 0; i < n; ++i) {
      const bool blind = row_max[i] == -kInfinity && row_sum[i] == 0.0f;
      const float inverse = blind ? 0.0f : 1.0f / row_sum[i];
      write_row(f.in.dtype, out + i * padded, inverse, f.out.at(begin + i, head), f.in.D);
      if (f.lse) f.lse[head * f.in.Tq + begin + i] = blind ? -kInfinity : row_max[i] + __builtin_logf(row_sum[i]);
      if (mass)
        for (int64_t m = 0; m < f.in.Mk; ++m)
          f.mass[((begin + i) * f.in.H + head) * f.in.Mk + m] = mass[i * f.in.Mk + m] * inverse;
    }
  }
};

inline int64_t forward_scratch(const Forward& f) {
  Scratch scratch{nullptr};
  const ForwardTile measured(f, f.tile_rows, scratch);
  return scratch.used;
}

inline void forward_tile(const Forward& f, int64_t task, int64_t following, float* memory) {
  Scratch scratch{memory};
  ForwardTile state(f, f.tile_rows, scratch);
  const int32_t* bounds = f.tiles + 4 * (task / f.in.H);
  state.start(bounds[0], bounds[1] - bounds[0], task % f.in.H);
  if (following != kNone) state.look_ahead(following / f.in.H, following % f.in.H);
  for (int64_t s = bounds[2]; s < bounds[3];) {
    const int64_t begin = f.spans[3 * s];
    int64_t end = f.spans[3 * s + 1];
    for (++s; s < bounds[3] && f.spans[3 * s] == end; ++s) end = f.spans[3 * s + 1];
    const int64_t panels = panels_of_block(f.in, begin, end, state.block / kPanel);
    for (int64_t j = begin; j < end;) {
      const Keys keys = keys_of(f.in, j, end, panels);
      state.attend(keys);
      j = keys.end();
    }
  }
  state.finish();
}

}  // namespace mm::cpu::attention::MM_ISA
