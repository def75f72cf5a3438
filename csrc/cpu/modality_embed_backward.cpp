// Backward of modality_embed.h, in two stages per block of rows; no result depends on the number of threads.
// 1. Rows, in chunks: the gradient dx of each row before the norm, which is the stream's gradient; chunk c of every
// block
//    adds to partial sum c of the modalities and of the norm.
// 2. Table rows: each is the sum of dx over the tokens that read it, in token order, and has one owner.
// Letters as in modality_embed.h; K table rows in all, numbered through.
#include <atomic>
#include <cstring>
#include <memory>

#include "cpu/modality_embed.h"
#include "cpu/modality_embed_rows.h"

namespace mm::cpu::embed {
namespace {

constexpr int64_t kChunks = 32;
constexpr int64_t kChunkRows = 32;                  // at least, where there are so many
constexpr int64_t kBlockBytes = int64_t{16} << 20;  // of dx: still cached when the second stage reads it
constexpr int64_t kColumns = 256, kKeyRanges = 16;  // a task of the second stage is one of 16 ranges, 256 columns
constexpr int64_t kSerialElements = 65536;          // less work than this is not worth a second thread
constexpr int kGroup = 4;                           // rows of one modality that share a pass over the partial sums
constexpr int64_t kAhead = 4;                       // readers of a table row
constexpr int64_t kUnroll = 8;                      // vectors of a table row that are summed in registers

// Table rows that tokens read, as lists of tokens: key k is read by tokens[first[k]] to tokens[first[k + 1] - 1].
struct Readers {
  std::vector<float*> tables;  // wanted ones
  std::vector<int64_t> base;   // [tables + 1]: key of each table's first row; K
  std::vector<int> slot;       // position table -> index in `tables`, or -1; last entry: the token table
  std::vector<int64_t> first;
  std::vector<int32_t> tokens;  // counted from the block's first

  Readers(const Inputs& in, const Grads& grads) : base{0}, slot(in.tables.size() + 1, -1) {
    const auto want = [&](size_t i, float* table, int64_t rows) {
      if (table == nullptr) return;
      slot[i] = static_cast<int>(tables.size());
      tables.push_back(table);
      base.push_back(base.back() + rows);
    };
    for (size_t i = 0; i < in.tables.size(); ++i) want(i, grads.tables[i], in.tables[i].rows);
    want(in.tables.size(), grads.token, in.token.rows);
  }

  // Returns the first token that points outside, or -1.
  int64_t gather(const Inputs& in, int64_t begin, int64_t end) {
    constexpr int kKeys = kMaxTables + 1;
    std::vector<int64_t> keys((end - begin) * kKeys, -1);
    first.assign(base.back() + 2, 0);  // counted one place late: filling then leaves the starts in place
    Token token;
    for (int64_t t = begin; t < end; ++t) {
      if (!locate(in, t, token)) return t;
      int64_t* key = keys.data() + (t - begin) * kKeys;
      const auto read = [&](int index, int64_t row) {
        if (index < 0) return;
        *key = base[index] + row;
        ++first[*key++ + 2];
      };
      for (int j = 0; j < token.num_tables; ++j) read(slot[token.table[j]], token.position[j]);
      if (token.table_row >= 0) read(slot.back(), token.table_row);
    }
    for (size_t k = 2; k < first.size(); ++k) first[k] += first[k - 1];
    tokens.resize(first.back());
    for (size_t i = 0; i < keys.size(); ++i) {
      if (keys[i] >= 0) tokens[first[keys[i] + 1]++] = static_cast<int32_t>(i / kKeys);
    }
    return -1;
  }
};

// What the chunks of the first stage share.
struct Block {
  const Inputs& in;
  const Grads& grads;
  const float* weight;  // of the norm, padded
  int64_t stride;       // of scratch rows
  bool whole;           // E is whole vectors: rows of fp32 tensors are read and written in place
  int64_t start;        // first token
  const float** dx;     // [rows]: where dx of each row is, or null

  // Whether the gradient of token t's stream row is an fp32 tensor that takes dx in place.
  MM_INLINE bool direct(int64_t m, int64_t source_row) const {
    return whole && source_row >= 0 && grads.streams[m].data != nullptr && grads.streams[m].kind == Kind::kF32;
  }
};

// Rows without such a tensor have their dx in scratch memory, chunk after chunk: no more of it than there are such
// rows, because fresh memory costs more than what is written to it.  kept_before[c]: how many rows the chunks before c
// keep; returns how many there are.
int64_t count_kept(const Block& block, int64_t stop, int64_t chunk_rows, std::vector<int64_t>& kept_before) {
  const Inputs& in = block.in;
  kept_before.clear();
  int64_t count = 0;
  for (int64_t t = block.start; t < stop; ++t) {
    if ((t - block.start) % chunk_rows == 0) kept_before.push_back(count);
    const size_t m = in.modality_ids[t];
    count += m >= in.streams.size() || !block.direct(m, in.source_rows[t]);
  }
  return count;
}

// dx from the gradient g of the normed rows; x holds the sums, and the normed values afterwards.
template <int kRows>
MM_INLINE void rows_through_norm(const Block& block, const int64_t t, const float* const* g, float* const* x,
                                 float* const* dx, float* d_weight, float* d_bias, float* d_modality) {
  const bool centre = block.in.norm == Norm::kLayer;
  F32x8 mean[kRows], rstd[kRows], sum_g[kRows], sum_gx[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    mean[r] = splat(centre ? block.grads.mean[t + r] : 0.0f);
    rstd[r] = splat(block.grads.rstd[t + r]);
    sum_g[r] = sum_gx[r] = splat(0.0f);
  }
  for (int64_t e = 0; e < block.in.E; e += kLanes) {  // weight and g are zero in the padding
    const F32x8 weight = load(block.weight + e);
    F32x8 for_weight = load(d_weight + e), for_bias = load(d_bias + e);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const F32x8 normed = (load(x[r] + e) - mean[r]) * rstd[r], grad = load(g[r] + e), scaled = grad * weight;
      for_weight += grad * normed;
      for_bias += grad;
      sum_g[r] += scaled;
      sum_gx[r] += scaled * normed;
      store(x[r] + e, normed);
    }
    store(d_weight + e, for_weight);
    store(d_bias + e, for_bias);
  }
  F32x8 mean_g[kRows], mean_gx[kRows];
  const float scale = 1.0f / static_cast<float>(block.in.E);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    mean_g[r] = splat(centre ? sum(sum_g[r]) * scale : 0.0f);
    mean_gx[r] = splat(sum(sum_gx[r]) * scale);
  }
  for (int64_t e = 0; e < block.in.E; e += kLanes) {
    const F32x8 weight = load(block.weight + e);
    F32x8 for_modality = load(d_modality + e);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const F32x8 value = (load(g[r] + e) * weight - mean_g[r] - load(x[r] + e) * mean_gx[r]) * rstd[r];
      store(dx[r] + e, value);
      for_modality += value;
    }
    store(d_modality + e, for_modality);
  }
}

template <int kRows>
MM_INLINE void rows_without_norm(int64_t E, const float* const* g, float* const* dx, float* d_modality) {
  for (int64_t e = 0; e < E; e += kLanes) {
    F32x8 for_modality = load(d_modality + e);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const F32x8 value = load(g[r] + e);
      store(dx[r] + e, value);
      for_modality += value;
    }
    store(d_modality + e, for_modality);
  }
}

// kRows tokens of one modality from t.  sums: a row of each, where there is a norm; scratch: 3 * kGroup rows.
template <int kRows>
MM_INLINE void group_of_rows(const Block& block, int64_t t, const Token* tokens, float* sums, float* scratch,
                             float* partials, float*& kept) {
  const Inputs& in = block.in;
  const Grads& grads = block.grads;
  const int64_t M = in.streams.size(), E = in.E, stride = block.stride, m = tokens[0].modality;
  const float* g[kRows];
  float *x[kRows], *dx[kRows];
  bool direct[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    x[r] = sums + r * stride;
    if (block.whole && grads.out.kind == Kind::kF32 && !in.dropout.on) {
      g[r] = static_cast<const float*>(grads.out.data) + (t + r) * E;
    } else {
      float* row = scratch + (kGroup + r) * stride;
      load_row(grads.out, t + r, row, E);
      if (in.dropout.on) dropout_row(in.dropout, t + r, row, E);
      g[r] = row;
    }
    direct[r] = block.direct(m, tokens[r].stream_row);
    if (direct[r]) {
      dx[r] = static_cast<float*>(grads.streams[m].data) + tokens[r].stream_row * E;
    } else if (kept != nullptr) {
      dx[r] = kept;
      kept += stride;
    } else {
      dx[r] = scratch + (2 * kGroup + r) * stride;
    }
    if (block.dx) block.dx[t + r - block.start] = dx[r];
  }
  float* d_modality = partials + m * stride;
  if (in.norm == Norm::kNone) {
    rows_without_norm<kRows>(E, g, dx, d_modality);
  } else {
    rows_through_norm<kRows>(block, t, g, x, dx, partials + M * stride, partials + (M + 1) * stride, d_modality);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    if (!direct[r] && tokens[r].stream_row >= 0 && grads.streams[m].data != nullptr) {
      store_row<false>(grads.streams[m], tokens[r].stream_row, dx[r], E);
    }
  }
}

// What the next group of rows will read and write.
MM_INLINE void prefetch_group(const Block& block, int64_t t, int64_t end) {
  const Inputs& in = block.in;
  Token token;
  for (; t < end; ++t) {
    if (!locate(in, t, token)) return;
    prefetch_row(row_at(block.grads.out, t, in.E), row_bytes(block.grads.out.kind, in.E));
    if (in.norm != Norm::kNone) prefetch_row(token.row, row_bytes(token.kind, in.E));
    if (token.stream_row < 0) continue;
    const Rows& stream = block.grads.streams[token.modality];
    if (stream.data) prefetch_row<true>(row_at(stream, token.stream_row, in.E), row_bytes(stream.kind, in.E));
  }
}

// partials: rows of `stride` floats, M for the modalities, then norm weight, norm bias.
// kept: where rows of this chunk go that have no fp32 tensor, or null.
MM_CLONES int64_t chunk_of_rows(const Block& block, float* scratch, float* partials, float* kept, int64_t begin,
                                int64_t end) {
  Token tokens[kGroup];
  for (int64_t t = begin; t < end;) {
    prefetch_group(block, t + kGroup, std::min(t + 2 * kGroup, end));
    const int n = static_cast<int>(std::min<int64_t>(kGroup, end - t));
    bool alike = n == kGroup;
    for (int r = 0; r < n; ++r) {
      if (!locate(block.in, t + r, tokens[r])) return t + r;
      alike = alike && tokens[r].modality == tokens[0].modality;
      if (block.in.norm != Norm::kNone) sum_token(block.in, tokens[r], scratch + r * block.stride);
    }
    if (alike) {
      group_of_rows<kGroup>(block, t, tokens, scratch, scratch, partials, kept);
    } else {
      for (int r = 0; r < n; ++r)
        group_of_rows<1>(block, t + r, tokens + r, scratch + r * block.stride, scratch, partials, kept);
    }
    t += n;
  }
  return -1;
}

// to = (add ? to : 0) + the sum over dx[tokens[i]], kVectors vectors of it.
template <int64_t kVectors>
MM_INLINE void sum_readers(float* to, const float* const* dx, int64_t column, const int32_t* token, int64_t count,
                           bool add) {
  F32x8 total[kVectors];
#pragma GCC unroll 8
  for (int64_t v = 0; v < kVectors; ++v) total[v] = add ? load(to + v * kLanes) : splat(0.0f);
  for (int64_t i = 0; i < count; ++i) {
    const float* from = dx[token[i]] + column;
    if (i + kAhead < count) prefetch_row(dx[token[i + kAhead]] + column, kVectors * kLanes * sizeof(float));
#pragma GCC unroll 8
    for (int64_t v = 0; v < kVectors; ++v) total[v] += load(from + v * kLanes);
  }
#pragma GCC unroll 8
  for (int64_t v = 0; v < kVectors; ++v) store(to + v * kLanes, total[v]);
}

// Rows [begin, end) of a table, columns [column, column + n).  first: the list of readers of the table's row 0.
MM_CLONES void sum_table_rows(float* table, int64_t E, int64_t begin, int64_t end, const int64_t* first,
                              const int32_t* tokens, const float* const* dx, int64_t column, int64_t n, bool add) {
  for (int64_t row = begin; row < end; ++row) {
    float* to = table + row * E + column;
    const int32_t* token = tokens + first[row];
    const int64_t count = first[row + 1] - first[row];
    if (count == 0) {
      // The first column task clears whole rows, and all that nobody reads up to the next reader at once.
      int64_t stop = row + 1;
      while (stop < end && first[stop + 1] == first[row]) ++stop;
      if (!add && column == 0) std::memset(to, 0, (stop - row) * E * sizeof(float));
      row = stop - 1;
      continue;
    }
    int64_t e = 0;
    for (; e + kUnroll * kLanes <= n; e += kUnroll * kLanes) {
      sum_readers<kUnroll>(to + e, dx, column + e, token, count, add);
    }
    for (; e + kLanes <= n; e += kLanes) sum_readers<1>(to + e, dx, column + e, token, count, add);
    if (e < n) {
      float tail[kLanes] = {};
      std::memcpy(tail, to + e, (add ? n - e : 0) * sizeof(float));
      sum_readers<1>(tail, dx, column + e, token, count, add);
      std::memcpy(to + e, tail, (n - e) * sizeof(float));
    }
  }
}

// The second stage for one block; the first block writes rows that nobody reads as zeros.
void sum_tables(const Readers& readers, const float* const* dx, int64_t E, bool add, const Parallel& parallel) {
  const int64_t K = readers.base.back(), column_tasks = (E + kColumns - 1) / kColumns;
  // A row costs about as much as a reader: the ranges share both.
  const auto bound = [&](int64_t part) {
    const int64_t share = (K + readers.first[K]) * part / kKeyRanges;
    int64_t low = 0, high = K;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (readers.first[middle] + middle < share) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return part == kKeyRanges ? K : low;
  };
  const bool small = (K + readers.first[K]) * E < kSerialElements;
  const int64_t tasks = kKeyRanges * column_tasks;
  parallel(tasks, small ? tasks : 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / column_tasks, column = task % column_tasks * kColumns;
      const int64_t from = bound(part), to = bound(part + 1);
      for (size_t i = 0; i < readers.tables.size(); ++i) {
        const int64_t base = readers.base[i];
        const int64_t low = std::max(from, base) - base, high = std::min(to, readers.base[i + 1]) - base;
        if (low >= high) continue;
        sum_table_rows(readers.tables[i], E, low, high, readers.first.data() + base, readers.tokens.data(), dx, column,
                       std::min(kColumns, E - column), add);
      }
    }
  });
}

MM_CLONES void add_rows(float* to, const float* from, int64_t n) {
  for (int64_t e = 0; e < n; ++e) to[e] += from[e];
}

}  // namespace

std::string backward(const Inputs& in, const Grads& grads, const Parallel& parallel) {
  const int64_t E = in.E, T = in.T, stride = padded(E), M = in.streams.size(), slots = M + 2;
  const std::vector<float> weight = padded_row(in.norm_weight, 1.0f, E);
  Readers readers(in, grads);
  const bool any_table = !readers.tables.empty();
  const int64_t cached = std::max(kChunks * kChunkRows, kBlockBytes / std::max<int64_t>(4, stride * 4));
  const int64_t block_rows = std::min(any_table ? cached : T, T);
  const int64_t chunk_rows = std::max(kChunkRows, (block_rows + kChunks - 1) / kChunks);
  const int64_t chunks = (block_rows + chunk_rows - 1) / chunk_rows;
  std::vector<float> partials(chunks * slots * stride, 0.0f);
  std::vector<int64_t> kept_before;
  std::unique_ptr<float[]> kept;
  std::vector<const float*> dx(any_table ? block_rows : 0);
  Block block{in, grads, weight.data(), stride, E % kLanes == 0, 0, any_table ? dx.data() : nullptr};
  const int64_t grain = std::max<int64_t>(1, kSerialElements / std::max<int64_t>(1, chunk_rows * E));
  std::atomic<int64_t> bad{-1};

  for (block.start = 0; block.start < T; block.start += block_rows) {
    const int64_t stop = std::min(block.start + block_rows, T);
    const int64_t own = (stop - block.start + chunk_rows - 1) / chunk_rows;
    if (any_table) {
      kept.reset();
      kept.reset(new float[count_kept(block, stop, chunk_rows, kept_before) * stride]);
    }
    // The lists of readers are one more chunk.
    parallel(own + any_table, grain, [&](int64_t first, int64_t last) {
      std::vector<float> scratch(3 * kGroup * stride);
      for (int64_t c = first; c < last; ++c) {
        const int64_t begin = block.start + c * chunk_rows, end = std::min(begin + chunk_rows, stop);
        int64_t found;
        if (c == own) {
          found = readers.gather(in, block.start, stop);
        } else {
          float* own_kept = any_table ? kept.get() + kept_before[c] * stride : nullptr;
          found = chunk_of_rows(block, scratch.data(), partials.data() + c * slots * stride, own_kept, begin, end);
        }
        if (found >= 0) bad = found;
      }
    });
    if (bad >= 0) return describe(in, bad);
    if (any_table) sum_tables(readers, dx.data(), E, block.start > 0, parallel);
  }
  if (T == 0) {
    for (size_t i = 0; i < readers.tables.size(); ++i) {
      std::fill_n(readers.tables[i], (readers.base[i + 1] - readers.base[i]) * E, 0.0f);
    }
  }

  for (int64_t slot = 0; slot < slots; ++slot) {
    float* to = slot < M ? (grads.modality ? grads.modality + slot * E : nullptr)
                         : (slot == M ? grads.norm_weight : grads.norm_bias);
    if (to == nullptr) continue;
    std::fill_n(to, E, 0.0f);
    for (int64_t c = 0; c < chunks; ++c) add_rows(to, partials.data() + (c * slots + slot) * stride, E);
  }
  return "";
}

}  // namespace mm::cpu::embed
