// Backward of modality_embed.h, in two stages per block of rows; no result depends on the number of threads.
// 1. Rows, in chunks: the gradient dx of each row before the norm, which is the stream's gradient; chunk c of every
//    block adds to partial sum c of the modalities and of the norm.  Of a modality it adds sums of few rows: one row
//    after the other would round further than torch's own sum of a stream.
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
constexpr int32_t kSumRows = 32;                    // that are added one after the other
constexpr int64_t kBlockBytes = int64_t{16} << 20;  // of dx: still cached when the second stage reads it
constexpr int64_t kColumns = 256, kKeyRanges = 16;  // a task of the second stage is one of 16 ranges, 256 columns
constexpr int64_t kRowsAhead = 2;                   // that the first stage asks for before it needs them
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

// What a row reads and writes.
struct RowSoon {
  Soon x, g, dx;
};

// Of row t, or where that points outside of `token`, which does not.
MM_INLINE RowSoon row_soon(const Block& block, int64_t t, Token token) {
  const Inputs& in = block.in;
  Token found;
  if (locate(in, t, found)) token = found;
  const Rows &out = block.grads.out, &stream = block.grads.streams[token.modality];
  const Soon g(row_at(out, t, in.E), out.kind);
  const bool wanted = token.stream_row >= 0 && stream.data != nullptr;
  return {{token.row, token.kind}, g, wanted ? Soon(row_at(stream, token.stream_row, in.E), stream.kind) : g};
}

// dx from the gradient g of a normed row; x holds the row's sum, and the normed values afterwards.
MM_INLINE void row_through_norm(const Block& block, int64_t t, const float* g, float* x, float* dx, float* d_weight,
                                float* d_bias, float* d_modality, const RowSoon& soon) {
  const int64_t E = block.in.E;
  const bool centre = block.in.norm == Norm::kLayer;
  const F32x8 mean = splat(centre ? block.grads.mean[t] : 0.0f), rstd = splat(block.grads.rstd[t]);
  F32x8 sum_g[2] = {splat(0.0f), splat(0.0f)};  // two, so that additions need not wait for each other
  F32x8 sum_gx[2] = {splat(0.0f), splat(0.0f)};
  for (int64_t e = 0; e < E; e += 2 * kLanes) {  // weight and g are zero in the padding
    soon.g.ask(e);
    soon.dx.ask<true>(e);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const int64_t at = e + i * kLanes;
      if (at >= E) break;
      const F32x8 normed = (load(x + at) - mean) * rstd, grad = load(g + at), scaled = grad * load(block.weight + at);
      store(d_weight + at, load(d_weight + at) + grad * normed);
      store(d_bias + at, load(d_bias + at) + grad);
      sum_g[i] += scaled;
      sum_gx[i] += scaled * normed;
      store(x + at, normed);
    }
  }
  const float scale = 1.0f / static_cast<float>(E);
  const F32x8 mean_g = splat(centre ? sum(sum_g[0] + sum_g[1]) * scale : 0.0f);
  const F32x8 mean_gx = splat(sum(sum_gx[0] + sum_gx[1]) * scale);
  for (int64_t e = 0; e < E; e += kLanes) {
    const F32x8 value = (load(g + e) * load(block.weight + e) - mean_g - load(x + e) * mean_gx) * rstd;
    store(dx + e, value);
    store(d_modality + e, load(d_modality + e) + value);
  }
}

MM_INLINE void row_without_norm(int64_t E, const float* g, float* dx, float* d_modality, const RowSoon& soon) {
  for (int64_t e = 0; e < E; e += kLanes) {
    if (e % (2 * kLanes) == 0) {
      soon.g.ask(e);
      soon.dx.ask<true>(e);
    }
    const F32x8 value = load(g + e);
    store(dx + e, value);
    store(d_modality + e, load(d_modality + e) + value);
  }
}

// Of a modality in one chunk, a few rows at a time: the first go to the partial sum itself, while that is zero.
struct Sum {
  float *partial, *few, *to;  // to: one of the others, where the next row goes; `few` is zero while it is not that
  int32_t rows;               // that are in `to`

  MM_INLINE void settle(int64_t stride) {
    if (to == few) {
      for (int64_t e = 0; e < stride; e += kLanes) {
        store(partial + e, load(partial + e) + load(few + e));
        store(few + e, splat(0.0f));
      }
    }
    to = few;
    rows = 0;
  }
};

// Where chunks keep what they work on: scratch holds three rows, and one for each of `sums` (`few`).
struct Chunk {
  float *scratch, *partials;  // partials: rows of `stride` floats, M for the modalities, then norm weight, norm bias
  Sum* sums;                  // [M], of the modalities
  float* kept;                // where rows go that have no fp32 tensor, or null
};

MM_INLINE void backward_row(const Block& block, int64_t t, const Token& token, Chunk& chunk, const RowSoon& soon) {
  const Inputs& in = block.in;
  const Grads& grads = block.grads;
  const int64_t M = in.streams.size(), E = in.E, stride = block.stride, m = token.modality;
  float *x = chunk.scratch, *dx = chunk.scratch + 2 * stride;
  const float* g = chunk.scratch + stride;
  if (block.whole && grads.out.kind == Kind::kF32 && !in.dropout.on) {
    g = static_cast<const float*>(grads.out.data) + t * E;
  } else {
    load_row(grads.out, t, chunk.scratch + stride, E);
    if (in.dropout.on) dropout_row(in.dropout, t, chunk.scratch + stride, E);
  }
  const bool direct = block.direct(m, token.stream_row);
  if (direct) {
    dx = static_cast<float*>(grads.streams[m].data) + token.stream_row * E;
  } else if (chunk.kept != nullptr) {
    dx = chunk.kept;
    chunk.kept += stride;
  }
  if (block.dx) block.dx[t - block.start] = dx;
  float* d_modality = chunk.sums[m].to;
  if (in.norm == Norm::kNone) {
    row_without_norm(E, g, dx, d_modality, soon);
  } else {
    sum_token(in, token, x, soon.x);
    row_through_norm(block, t, g, x, dx, chunk.partials + M * stride, chunk.partials + (M + 1) * stride, d_modality,
                     soon);
  }
  if (++chunk.sums[m].rows == kSumRows) chunk.sums[m].settle(stride);
  if (!direct && token.stream_row >= 0 && grads.streams[m].data != nullptr) {
    store_row<false>(grads.streams[m], token.stream_row, dx, E);
  }
}

// One row at a time: several at once, which would share a pass over the partial sums, make so many streams of memory
// that it takes a fifth longer where caches are cold.  Returns the first token that points outside, or -1.
MM_CLONES int64_t chunk_of_rows(const Block& block, Chunk chunk, int64_t begin, int64_t end) {
  Token token;
  for (int64_t t = begin; t < end; ++t) {
    if (!locate(block.in, t, token)) return t;
    backward_row(block, t, token, chunk, row_soon(block, std::min(t + kRowsAhead, end - 1), token));
  }
  const int64_t M = block.in.streams.size();
  for (int64_t m = 0; m < M; ++m) {
    if (chunk.sums[m].rows > 0) chunk.sums[m].settle(block.stride);
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
    if (i + kAhead < count) prefetch(dx[token[i + kAhead]] + column, kVectors * kLanes * sizeof(float));
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

// to [E] = the sum of `count` rows, padded, that begin `pitch` apart: every fourth in one sum.
MM_CLONES void sum_partials(float* to, int64_t E, const float* from, int64_t pitch, int64_t count) {
  for (int64_t e = 0; e < E; e += kLanes) {
    F32x8 sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    for (int64_t c = 0; c < count; c += 4) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) {
        if (c + i < count) sums[i] += load(from + (c + i) * pitch + e);
      }
    }
    const F32x8 total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    if (e + kLanes <= E) {
      store(to + e, total);
    } else {
      store_tail(to + e, total, E - e);
    }
  }
}

}  // namespace

std::string backward(const Inputs& in, const Grads& grads, const Parallel& parallel) {
  const int64_t E = in.E, T = in.T, stride = padded(E), M = in.streams.size();
  const int64_t slots = M + (in.norm == Norm::kNone ? 0 : 2);  // partial sums of a chunk
  const std::vector<float> weight = padded_row(in.norm_weight, 1.0f, E);
  Readers readers(in, grads);
  const bool any_table = !readers.tables.empty();
  const int64_t cached = std::max(kChunks * kChunkRows, kBlockBytes / std::max<int64_t>(4, stride * 4));
  const int64_t block_rows = std::min(any_table ? cached : T, T);
  const int64_t chunk_rows = std::max(kChunkRows, (block_rows + kChunks - 1) / kChunks);
  const int64_t chunks = (block_rows + chunk_rows - 1) / chunk_rows;
  const std::unique_ptr<float[]> partials(new float[chunks * slots * stride]);
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
      std::vector<float> scratch((3 + M) * stride);
      std::vector<Sum> sums(M);
      for (int64_t c = first; c < last; ++c) {
        const int64_t begin = block.start + c * chunk_rows, end = std::min(begin + chunk_rows, stop);
        int64_t found;
        if (c == own) {
          found = readers.gather(in, block.start, stop);
        } else {
          float* own_kept = any_table ? kept.get() + kept_before[c] * stride : nullptr;
          float* own_partials = partials.get() + c * slots * stride;
          // here, not by who asks: in the caches of the thread that adds to them
          if (block.start == 0) std::fill_n(own_partials, slots * stride, 0.0f);
          for (int64_t m = 0; m < M; ++m) {
            float *partial = own_partials + m * stride, *few = scratch.data() + (3 + m) * stride;
            sums[m] = {partial, few, block.start == 0 ? partial : few, 0};
          }
          found = chunk_of_rows(block, {scratch.data(), own_partials, sums.data(), own_kept}, begin, end);
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
    if (to != nullptr) sum_partials(to, E, partials.get() + slot * stride, slots * stride, chunks);
  }
  return "";
}

}  // namespace mm::cpu::embed
