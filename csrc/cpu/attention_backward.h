// Backward: one key range of one sample and key head, all of whose queries it walks over.   p, ds as in reference.py
//
// Scores are computed once and serve five products: p = exp(q k^T - lse), dp = do v^T, dv += p^T do, dk += ds^T q,
// dq += ds k.  All sums stay in fp32, in an order that the shapes alone decide.
// delta = rowsum(p dp), which is rowsum(do out) but for the rounding of out: taken from the scores where a block has
// all of a row, by a pass of its own where rounding would show (sums of ds in dbias), and else from out.
// Where the scores are summed, p is also divided by its own sum, which takes the rounding of lse back out.
// For attention_kernels.h alone, which is compiled once per instruction set.
#pragma once

#include "attention_block.h"
#include "attention_gemm.h"

namespace mm::cpu::attention::MM_ISA {

// Columns and queries of a block: as many as leave a block's operands room in the second-level cache.  Where modalities
// cut panels short there are more columns, so that a short sample is still one block.
MM_INLINE int64_t backward_columns(const Inputs& in) { return (in.D <= 128 ? 128 : 64) * (in.has_visible ? 3 : 2) / 2; }
MM_INLINE int64_t backward_queries(int64_t D) { return D <= 64 ? 8 * kBand : D <= 128 ? 4 * kBand : 2 * kBand; }
constexpr int64_t kMaxBands = 8 * kBand / kLeastQueries;

struct BackwardRange {
  const Backward& b;
  int64_t padded, ld, ld_scores, block_columns, block_queries;
  int64_t depth;                    // words of a row
  float *key, *key_t, *value_t;     // of a block: [keys, ld] woven, and panels of the transposes
  float *query, *dout;              // [block_queries, ld]
  float *query_woven, *dout_woven;  // the same where words are floats
  float *lse, *delta, *norm;        // [queries] of the head; p is norm e^(score - lse)
  float *products, *total;          // [queries]: sums so far of e^(score - lse) dp, and without dp
  float *p, *ds;                    // [block_queries, ld_scores]
  float *p_woven, *ds_woven;        // the same where words are floats
  float *dq, *dk, *dv;              // of the range: [queries, padded], [keys, padded] twice
  float *bias, *keep, *row;
  enum class Stage { kDelta, kGradients, kBoth } stage = Stage::kBoth;  // delta known before, or found row by row
  int64_t first_query = 0, queries = 0, head = 0;
  double* dbias = nullptr;  // [Mq, Mk] of the head
  Ahead ahead;

  BackwardRange(const Backward& backward, int64_t max_queries, int64_t max_keys, Scratch& scratch)
      : b(backward), ahead(backward.in) {
    const int64_t D = b.in.D;
    padded = round_up(D, W);
    ld = padded + kRowGap;
    depth = words(D);
    block_columns = backward_columns(b.in);
    block_queries = backward_queries(D);
    ld_scores = block_columns + kRowGap;
    key = scratch.take(block_columns * ld);
    key_t = scratch.take(block_columns * depth);
    value_t = scratch.take(block_columns * depth);
    query = scratch.take(block_queries * ld);
    dout = scratch.take(block_queries * ld);
    query_woven = kTerms == 1 ? query : scratch.take(words(block_queries) * ld);
    dout_woven = kTerms == 1 ? dout : scratch.take(words(block_queries) * ld);
    lse = scratch.take(max_queries);
    delta = scratch.take(max_queries);
    norm = scratch.take(max_queries);
    products = scratch.take(max_queries);
    total = scratch.take(max_queries);
    p = scratch.take(block_queries * ld_scores);
    ds = scratch.take(block_queries * ld_scores);
    p_woven = kTerms == 1 ? p : scratch.take(words(block_queries) * ld_scores);
    ds_woven = kTerms == 1 ? ds : scratch.take(words(block_queries) * ld_scores);
    row = scratch.take(ld);
    bias = b.in.bias ? scratch.take(b.in.Mq * ld_scores) : nullptr;
    keep = b.in.dropout ? scratch.take(keep_floats(block_columns)) : nullptr;
    dq = scratch.take(max_queries * padded);
    dk = scratch.take(max_keys * padded);
    dv = scratch.take(max_keys * padded);
  }

  void run(const BackwardTask& task, const BackwardTask* following) {
    const Inputs& in = b.in;
    const int32_t* sample = b.samples + 4 * task.sample;
    first_query = sample[0];
    queries = sample[1] - sample[0];
    if (following) look_ahead(task, *following);
    const int64_t keys = task.key_end - task.key_begin;
    std::memset(dk, 0, sizeof(float) * keys * padded);
    std::memset(dv, 0, sizeof(float) * keys * padded);
    const int64_t panels = panels_of_block(in, task.key_begin, task.key_end, block_columns / kPanel);
    const bool one_block = keys_of(in, task.key_begin, task.key_end, panels).end() == task.key_end;
    const bool whole_rows = one_block && keys == sample[3] - sample[2];
    for (int64_t member = 0; member < in.group(); ++member) {
      head = task.kv_head * in.group() + member;
      dbias = task.dbias ? task.dbias + member * in.Mq * in.Mk : nullptr;
      read_statistics(whole_rows || exact_delta(b));
      std::memset(dq, 0, sizeof(float) * queries * padded);
      for (int pass = whole_rows || !exact_delta(b) ? 1 : 0; pass < 2; ++pass) {
        stage = pass == 0 ? Stage::kDelta : whole_rows ? Stage::kBoth : Stage::kGradients;
        for (int64_t j = task.key_begin; j < task.key_end;) {
          const Keys block = keys_of(in, j, task.key_end, panels);
          if (!one_block || member == 0) read_keys(block, task.kv_head);
          if (bias) read_bias(in, head, block, bias, ld_scores);
          walk(block, dk + (j - task.key_begin) * padded, dv + (j - task.key_begin) * padded);
          j = block.end();
        }
        for (int64_t i = 0; stage == Stage::kDelta && i < queries; ++i) finish_delta(i);
      }
      write_dq(task, member);
    }
    for (int64_t j = 0; j < keys; ++j) {
      write_row(in.dtype, dk + j * padded, scale_left(in), b.dk.at(task.key_begin + j, task.kv_head), in.D);
      write_row(in.dtype, dv + j * padded, 1.0f, b.dv.at(task.key_begin + j, task.kv_head), in.D);
    }
  }

  // The rows of the task that follows.
  void look_ahead(const BackwardTask& task, const BackwardTask& following) {
    const int32_t* sample = b.samples + 4 * following.sample;
    const int64_t h = following.kv_head * b.in.group();
    for (const Heads* keys : {&b.in.v, &b.in.k, &b.dk, &b.dv})
      ahead.add(*keys, following.key_begin, following.key_end, following.kv_head);
    for (const Heads* queries_of : {&b.in.q, &b.dout, &b.dq}) ahead.add(*queries_of, sample[0], sample[1], h);
    const int64_t pairs = pairs_between(b.in, first_query, first_query + queries, task.key_begin, task.key_end);
    ahead.spread(5 * b.in.group() * pairs);
  }

  // lse of the head's queries; delta without the part that the scores are to give.
  void read_statistics(bool from_scores) {
    const Inputs& in = b.in;
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t at = head * in.Tq + first_query + i;
      const bool blind = b.lse[at] == -kInfinity;
      lse[i] = blind ? kInfinity : b.lse[at];  // e^(score - inf) = 0
      delta[i] = blind || !b.dlse ? 0.0f : -b.dlse[at];
      norm[i] = 1.0f;
      products[i] = total[i] = 0.0f;
      if (from_scores || blind) continue;
      read_rows(in.dtype, b.out, first_query + i, 1, head, in.D, row, ld);
      read_rows(in.dtype, b.dout, first_query + i, 1, head, in.D, dout, ld);
      V sums{};
      for (int64_t d = 0; d < padded; d += W) sums += load(dout + d) * load(row + d);
      delta[i] += sum(sums);
    }
  }

  void finish_delta(int64_t i) {
    norm[i] = total[i] == 0.0f ? 0.0f : 1.0f / total[i];
    delta[i] += products[i] * norm[i];
  }

  void read_keys(const Keys& block, int64_t kv_head) {
    const Inputs& in = b.in;
    for (int64_t p = 0; p < block.panels; ++p) {
      const int64_t begin = block.first[p], count = block.width(p), column = p * kPanel;
      float* rows = key + words(column) * ld;
      read_words(in, in.v, begin, count, kv_head, rows, ld);
      transpose_rows(rows, ld, count, depth, value_t + column * depth);
      read_words(in, in.k, begin, count, kv_head, rows, ld);
      transpose_rows(rows, ld, count, depth, key_t + column * depth);
      if (kTerms == 2) read_woven(in, in.k, begin, count, kv_head, rows, ld);
    }
  }

  // Every query that sees a key of the block.
  void walk(const Keys& keys, float* dk_rows, float* dv_rows) {
    const Inputs& in = b.in;
    const int64_t begin = most(first_query, in.q_lo[keys.begin()]);
    const int64_t end = least(first_query + queries, in.q_hi[keys.end() - 1]);
    if (begin >= end) return;
    const int64_t blocks = (end - begin + block_queries - 1) / block_queries;
    const int64_t step = round_up((end - begin + blocks - 1) / blocks, kBand);
    for (int64_t i = begin; i < end; i += step) visit(keys, i, least(step, end - i), dk_rows, dv_rows);
  }

  void visit(const Keys& keys, int64_t begin, int64_t count, float* dk_rows, float* dv_rows) {
    const Inputs& in = b.in;
    Seen seen[kMaxBands];
    int64_t first[kMaxBands + 1] = {0};  // row of each band, then the end
    int64_t bands = 0, stretches = 0;
    for (; first[bands] < count; ++bands) {
      first[bands + 1] = band_end(in, begin + first[bands], begin + count, kBand) - begin;
      find_seen(in, begin + first[bands], begin + first[bands + 1], keys, seen[bands]);
      stretches += seen[bands].stretches;
    }
    if (stretches == 0) return;
    read_queries(in, begin, count, head, query, ld);
    read_words(in, b.dout, begin, count, head, dout, ld);
    if (kTerms == 2 && stage != Stage::kDelta) {
      read_woven(in, in.q, begin, count, head, query_woven, ld);
      read_woven(in, b.dout, begin, count, head, dout_woven, ld);
    }
    for (int64_t r = 0; r < bands; ++r) visit_band(keys, seen[r], begin, first[r], first[r + 1] - first[r]);
    if (stage == Stage::kDelta) return;
    // Keys panel by panel, each with the stretches of bands that see as much of it.
    for (int64_t panel = 0; panel < keys.panels; ++panel) {
      const int64_t column = panel * kPanel, to = keys.first[panel] - keys.begin();
      for (int64_t r = 0; r < bands;) {
        const int64_t width = seen[r].width[panel], from = first[r];
        do ++r;
        while (r < bands && seen[r].width[panel] == width);
        const int64_t rows = words(first[r] - from), word = words(from);
        multiply<true, true>(width, padded / W, rows, p_woven + word * ld_scores + column, ld_scores,
                             dout_woven + word * ld, ld, kPanel, dv_rows + to * padded, padded, 1.0f, ahead);
        multiply<true, true>(width, padded / W, rows, ds_woven + word * ld_scores + column, ld_scores,
                             query_woven + word * ld, ld, kPanel, dk_rows + to * padded, padded, 1.0f, ahead);
      }
    }
  }

  // Rows [first, first + rows) of a block whose first query is `begin`.
  void visit_band(const Keys& keys, const Seen& seen, int64_t begin, int64_t first, int64_t rows) {
    const Inputs& in = b.in;
    float *p_band = p + first * ld_scores, *ds_band = ds + first * ld_scores;
    for (int64_t s = 0; s < seen.stretches; ++s) {
      const Seen::Stretch& at = seen.stretch[s];
      const int64_t panel = kPanel * depth, offset = at.begin * depth;
      multiply<false, false>(rows, at.vecs(), depth, query + first * ld, ld, key_t + offset, kPanel, panel,
                             p_band + at.begin, ld_scores, scale_left(in), ahead);
      multiply<false, false>(rows, at.vecs(), depth, dout + first * ld, ld, value_t + offset, kPanel, panel,
                             ds_band + at.begin, ld_scores, 1.0f, ahead);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = begin + first + i;
      probability_row(keys, seen, token, p_band + i * ld_scores, ds_band + i * ld_scores);
      if (stage != Stage::kDelta) gradient_row(keys, seen, token, p_band + i * ld_scores, ds_band + i * ld_scores);
    }
    if (stage == Stage::kDelta) return;
    for (int64_t s = 0; s < seen.stretches; ++s) {
      const Seen::Stretch& at = seen.stretch[s];
      if (kTerms == 2) make_words(at, first, rows);
      multiply<false, true>(rows, padded / W, words(at.end - at.begin), ds_band + words(at.begin), ld_scores,
                            key + words(at.begin) * ld, ld, kPanel, dq + (begin + first - first_query) * padded, padded,
                            1.0f, ahead);
    }
  }

  // A band's probabilities and score gradients as operands: woven for the sums over queries, ds along the row too.
  void make_words(const Seen::Stretch& at, int64_t first, int64_t rows) {
    for (int64_t i = first; i < first + rows; i += 2) {
      const bool both = i + 1 < first + rows;
      float *p_row = p + i * ld_scores, *ds_row = ds + i * ld_scores;
      weave_rows(p_row, both ? p_row + ld_scores : nullptr, at.begin, at.end, p_woven + i / 2 * ld_scores);
      weave_rows(ds_row, both ? ds_row + ld_scores : nullptr, at.begin, at.end, ds_woven + i / 2 * ld_scores);
      narrow_in_place(ds_row, at.begin, at.end);
      if (both) narrow_in_place(ds_row + ld_scores, at.begin, at.end);
    }
  }

  // Scores to e^(score - lse), and where this stage learns delta, the row's sums.
  void probability_row(const Keys& keys, const Seen& seen, int64_t token, float* x, const float* dp) {
    const Inputs& in = b.in;
    const int64_t i = token - first_query;
    const float base = lse[i];
    if (seen.any_masked) mask_row(in, token, keys, seen, x);
    V sums{}, weighted{};
    for (int64_t s = 0; s < seen.stretches; ++s) {
      const Seen::Stretch& at = seen.stretch[s];
      close_row(at, x);
      if (bias) add_bias(at, bias + in.q_modality[token] * ld_scores, x);
      const float* z = keep ? read_kept(keys, at, token) : nullptr;
      for (int64_t j = at.begin; j < at.end; j += W) {
        const V e = exp(load(x + j) - base);
        store(x + j, e);
        sums += e;
        weighted += e * (z ? load(dp + j) * load(z + j) : load(dp + j));
      }
    }
    if (stage == Stage::kGradients) return;
    total[i] += sum(sums);
    products[i] += sum(weighted);
  }

  // e^(score - lse) to p z, and dp to ds.  The queries have been scaled, which is what dk wants; dq is scaled at the
  // end.
  void gradient_row(const Keys& keys, const Seen& seen, int64_t token, float* e, float* dp) {
    const Inputs& in = b.in;
    const int64_t i = token - first_query;
    if (stage == Stage::kBoth) finish_delta(i);
    const float mean = delta[i], inverse = norm[i];
    for (int64_t s = 0; s < seen.stretches; ++s) {
      const Seen::Stretch& at = seen.stretch[s];
      const float* z = keep ? read_kept(keys, at, token) : nullptr;
      for (int64_t j = at.begin; j < at.end; j += W) {
        const V probability = load(e + j) * inverse, kept = z ? load(z + j) : splat(1.0f);
        store(dp + j, probability * (load(dp + j) * kept - mean));
        store(e + j, probability * kept);
      }
      if (!dbias) continue;
      double* of_query = dbias + in.q_modality[token] * in.Mk;
      for_each_modality(in, keys, at,
                        [&](int32_t m, int64_t from, int64_t to) { of_query[m] += sum_of(dp, from, to); });
    }
  }

  // So that column j of the block is at [j].
  const float* read_kept(const Keys& keys, const Seen::Stretch& at, int64_t token) {
    return read_keep(b.in, head, token, keys.key(at.begin), at.end - at.begin, keep) - at.begin;
  }

  void write_dq(const BackwardTask& task, int64_t member) {
    const Inputs& in = b.in;
    for (int64_t i = 0; i < queries; ++i) {
      const float* from = dq + i * padded;
      if (task.partial) {
        write_row(DType::kFloat32, from, in.scale,
                  reinterpret_cast<char*>(task.partial + (i * in.group() + member) * in.D), in.D);
      } else {
        write_row(in.dtype, from, in.scale, b.dq.at(first_query + i, head), in.D);
      }
    }
  }
};

inline int64_t backward_scratch(const Backward& b, int64_t max_queries, int64_t max_keys) {
  Scratch scratch{nullptr};
  const BackwardRange measured(b, max_queries, max_keys, scratch);
  return scratch.used;
}

inline void backward_range(const Backward& b, const BackwardTask& task, const BackwardTask* following, float* memory) {
  Scratch scratch{memory};
  const int32_t* sample = b.samples + 4 * task.sample;
  BackwardRange state(b, sample[1] - sample[0], task.key_end - task.key_begin, scratch);
  state.run(task, following);
}

}  // namespace mm::cpu::attention::MM_ISA
