// See modality_embed.h.   Each packed row goes through a row of fp32 scratch that stays in the first-level cache.
#include "cpu/modality_embed.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>

#include "cpu/modality_embed_simd.h"

namespace mm::cpu::embed {
namespace {

using namespace simd;

constexpr int kMaxTables = 3;
// Backward works on blocks of rows small enough that their fp32 gradients are still in cache when the tables' sums read
// them.  Chunk c of every block adds to partial sum c: the order of additions depends on nothing but T and E.
// Without tables to sum there is one block, and the gradients of a row need not outlive it.
constexpr int64_t kChunkRows = 32;
constexpr int64_t kChunks = 32;
constexpr int64_t kColumns = 128;  // columns per task where tables are summed

// Where one token's numbers are.
struct Token {
  const void* row;
  Kind kind;
  int64_t modality, table_row, stream_row;  // table_row or stream_row is -1
  int num_tables;
  int64_t table[kMaxTables], position[kMaxTables];
};

MM_INLINE const char* row_at(const Rows& rows, int64_t index, int64_t E) {
  return static_cast<const char*>(rows.data) + index * E * (rows.kind == Kind::kF32 ? 4 : 2);
}

// False when an index points outside its table.
MM_INLINE bool locate(const Inputs& in, int64_t t, Token& token) {
  const int64_t m = in.modality_ids[t];
  if (m >= static_cast<int64_t>(in.streams.size())) return false;
  const Rows& stream = in.streams[m];
  const int64_t r = in.source_rows[t];
  token.modality = m;
  token.table_row = -1;
  token.stream_row = -1;
  if (r >= stream.rows) return false;
  if (r < 0) {
    token.table_row = -(r + 1);
  } else if (stream.kind == Kind::kI64) {
    token.table_row = static_cast<const int64_t*>(stream.data)[r];
  } else if (stream.kind == Kind::kI32) {
    token.table_row = static_cast<const int32_t*>(stream.data)[r];
  } else {
    token.stream_row = r;
    token.row = row_at(stream, r, in.E);
    token.kind = stream.kind;
  }
  if (token.stream_row < 0) {
    if (token.table_row < 0 || token.table_row >= in.token.rows) return false;
    token.row = row_at(in.token, token.table_row, in.E);
    token.kind = in.token.kind;
  }
  const int first = in.first_table[m];
  token.num_tables = in.first_table[m + 1] - first;
  for (int j = 0; j < token.num_tables; ++j) {
    const int64_t axis = in.A - token.num_tables + j;  // an axis that the layout does not have counts as 0
    token.table[j] = first + j;
    token.position[j] = axis < 0 ? 0 : in.positions[axis * in.T + t];
    if (token.position[j] < 0 || token.position[j] >= in.tables[first + j].rows) return false;
  }
  return true;
}

// x = source + modality row + position rows, and the sum over the row.
template <class Source, class Table>
MM_INLINE float sum_rows(const Source* source, const Table* modality, const Table* const* tables, int count, float* x,
                         int64_t E) {
  F32x8 total = splat(0.0f);
  int64_t e = 0;
  for (; e + kLanes <= E; e += kLanes) {
    F32x8 value = load(source + e) + load(modality + e);
    for (int j = 0; j < count; ++j) value += load(tables[j] + e);
    store(x + e, value);
    total += value;
  }
  if (e < E) {
    F32x8 value = load_tail(source + e, E - e) + load_tail(modality + e, E - e);
    for (int j = 0; j < count; ++j) value += load_tail(tables[j] + e, E - e);
    store(x + e, value);  // scratch is padded
    total += value;
  }
  return sum(total);
}

template <class Table>
MM_INLINE float sum_token(const Inputs& in, const Token& token, float* x) {
  const auto* modality = reinterpret_cast<const Table*>(row_at(in.modality, token.modality, in.E));
  const Table* tables[kMaxTables] = {};
  for (int j = 0; j < token.num_tables; ++j) {
    tables[j] = reinterpret_cast<const Table*>(row_at(in.tables[token.table[j]], token.position[j], in.E));
  }
  switch (token.kind) {
    case Kind::kF32:
      return sum_rows(static_cast<const float*>(token.row), modality, tables, token.num_tables, x, in.E);
    case Kind::kBF16:
      return sum_rows(static_cast<const BFloat16*>(token.row), modality, tables, token.num_tables, x, in.E);
    default:
      return sum_rows(static_cast<const Float16*>(token.row), modality, tables, token.num_tables, x, in.E);
  }
}

MM_INLINE float sum_token(const Inputs& in, const Token& token, float* x) {
  switch (in.modality.kind) {
    case Kind::kF32:
      return sum_token<float>(in, token, x);
    case Kind::kBF16:
      return sum_token<BFloat16>(in, token, x);
    default:
      return sum_token<Float16>(in, token, x);
  }
}

template <class Out>
MM_INLINE void store_row(Out* out, const float* x, int64_t E) {
  int64_t e = 0;
  for (; e + kLanes <= E; e += kLanes) store(out + e, load(x + e));
  if (e < E) store_tail(out + e, load(x + e), E - e);
}

MM_INLINE void store_row(const Rows& out, int64_t index, const float* x, int64_t E) {
  char* row = const_cast<char*>(row_at(out, index, E));
  switch (out.kind) {
    case Kind::kF32:
      return store_row(reinterpret_cast<float*>(row), x, E);
    case Kind::kBF16:
      return store_row(reinterpret_cast<BFloat16*>(row), x, E);
    default:
      return store_row(reinterpret_cast<Float16*>(row), x, E);
  }
}

template <class In>
MM_INLINE void load_row(const In* row, float* x, int64_t E) {
  int64_t e = 0;
  for (; e + kLanes <= E; e += kLanes) store(x + e, load(row + e));
  if (e < E) store(x + e, load_tail(row + e, E - e));
}

MM_INLINE void load_row(const Rows& rows, int64_t index, float* x, int64_t E) {
  const char* row = row_at(rows, index, E);
  switch (rows.kind) {
    case Kind::kF32:
      return load_row(reinterpret_cast<const float*>(row), x, E);
    case Kind::kBF16:
      return load_row(reinterpret_cast<const BFloat16*>(row), x, E);
    default:
      return load_row(reinterpret_cast<const Float16*>(row), x, E);
  }
}

// x -> (x - mean) * rstd * weight + bias in place; returns rstd.  All rows are padded to whole vectors.
MM_INLINE float normalize_row(float* x, float mean, float eps, const float* weight, const float* bias, int64_t E) {
  for (int64_t e = E; e % kLanes; ++e) x[e] = mean;  // the padding adds nothing to the variance
  F32x8 squares = splat(0.0f);
  for (int64_t e = 0; e < E; e += kLanes) {
    const F32x8 centered = load(x + e) - splat(mean);
    squares += centered * centered;
  }
  const float rstd = 1.0f / std::sqrt(sum(squares) / static_cast<float>(E) + eps);
  for (int64_t e = 0; e < E; e += kLanes) {
    store(x + e, (load(x + e) - splat(mean)) * splat(rstd) * load(weight + e) + load(bias + e));
  }
  return rstd;
}

int64_t padded(int64_t E) { return (E + kLanes - 1) / kLanes * kLanes; }

// `values`, or `otherwise` everywhere, padded with zeros.
std::vector<float> padded_row(const float* values, float otherwise, int64_t E) {
  std::vector<float> row(padded(E), 0.0f);
  for (int64_t e = 0; e < E; ++e) row[e] = values ? values[e] : otherwise;
  return row;
}

MM_CLONES int64_t forward_rows(const Inputs& in, const Rows& out, float* mean, float* rstd, const float* weight,
                               const float* bias, float* x, int64_t begin, int64_t end) {
  Token token;
  for (int64_t t = begin; t < end; ++t) {
    if (!locate(in, t, token)) return t;
    const float total = sum_token(in, token, x);
    if (in.normalize) {
      mean[t] = total / static_cast<float>(in.E);
      rstd[t] = normalize_row(x, mean[t], in.eps, weight, bias, in.E);
    }
    store_row(out, t, x, in.E);
  }
  return -1;
}

// Partial sums of one chunk: rows of padded(E) floats, M for the modalities, then norm weight, norm bias.
MM_CLONES int64_t backward_rows(const Inputs& in, const Grads& grads, const float* weight, float* scratch,
                                float* partials, float* dx_rows, int64_t dx_stride, int64_t begin, int64_t end) {
  const int64_t E = in.E, stride = padded(E), M = in.streams.size();
  const float scale = 1.0f / static_cast<float>(E);
  float* x = scratch;
  float* g = scratch + stride;
  float* d_weight = partials + M * stride;
  float* d_bias = d_weight + stride;
  Token token;
  for (int64_t t = begin; t < end; ++t) {
    if (!locate(in, t, token)) return t;
    float* dx = dx_rows + (t - begin) * dx_stride;
    load_row(grads.out, t, g, E);
    F32x8 sum_g = splat(0.0f), sum_gx = splat(0.0f);
    if (in.normalize) {
      sum_token(in, token, x);
      const F32x8 mean = splat(grads.mean[t]), rstd = splat(grads.rstd[t]);
      for (int64_t e = 0; e < E; e += kLanes) {  // weight and g are zero in the padding
        const F32x8 normed = (load(x + e) - mean) * rstd, grad = load(g + e), scaled = grad * load(weight + e);
        store(d_weight + e, load(d_weight + e) + grad * normed);
        store(d_bias + e, load(d_bias + e) + grad);
        sum_g += scaled;
        sum_gx += scaled * normed;
        store(x + e, normed);
        store(g + e, scaled);
      }
    }
    const F32x8 mean_g = splat(sum(sum_g) * scale), mean_gx = splat(sum(sum_gx) * scale);
    const F32x8 rstd = splat(in.normalize ? grads.rstd[t] : 1.0f);
    float* d_modality = partials + token.modality * stride;
    for (int64_t e = 0; e < E; e += kLanes) {
      F32x8 value = load(g + e);
      if (in.normalize) value = (value - mean_g - load(x + e) * mean_gx) * rstd;
      store(dx + e, value);
      store(d_modality + e, load(d_modality + e) + value);
    }
    if (token.stream_row >= 0 && grads.streams[token.modality].data != nullptr) {
      store_row(grads.streams[token.modality], token.stream_row, dx, E);
    }
  }
  return -1;
}

MM_INLINE void add(float* to, const float* from, int64_t n) {
  int64_t e = 0;
  for (; e + kLanes <= n; e += kLanes) store(to + e, load(to + e) + load(from + e));
  for (; e < n; ++e) to[e] += from[e];
}

// Adds columns [first, first + n) of the gradients of tokens [begin, end) to the tables, in token order.
MM_CLONES void add_to_tables(const Inputs& in, const Grads& grads, const float* dx_rows, int64_t begin, int64_t end,
                             int64_t first, int64_t n) {
  const int64_t E = in.E, stride = padded(E);
  Token token;
  for (int64_t t = begin; t < end; ++t) {
    if (!locate(in, t, token)) return;
    const float* dx = dx_rows + (t - begin) * stride + first;
    if (token.table_row >= 0 && grads.token) add(grads.token + token.table_row * E + first, dx, n);
    for (int j = 0; j < token.num_tables; ++j) {
      float* table = grads.tables[token.table[j]];
      if (table) add(table + token.position[j] * E + first, dx, n);
    }
  }
}

MM_CLONES void add_rows(float* to, const float* from, int64_t n) { add(to, from, n); }

std::string describe(const Inputs& in, int64_t t) {
  std::string text = "modality_embed: token " + std::to_string(t) + " of modality " +
                     std::to_string(in.modality_ids[t]) + " with source row " + std::to_string(in.source_rows[t]) +
                     " points outside its stream, token table or position table";
  return text;
}

}  // namespace

std::string forward(const Inputs& in, Rows out, float* mean, float* rstd, const Parallel& parallel) {
  const std::vector<float> weight = padded_row(in.norm_weight, 1.0f, in.E), bias = padded_row(in.norm_bias, 0.0f, in.E);
  std::atomic<int64_t> bad{-1};
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, in.E));
  parallel(in.T, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> x(padded(in.E));
    const int64_t found = forward_rows(in, out, mean, rstd, weight.data(), bias.data(), x.data(), begin, end);
    if (found >= 0) bad = found;
  });
  return bad < 0 ? "" : describe(in, bad);
}

std::string backward(const Inputs& in, const Grads& grads, const Parallel& parallel) {
  const int64_t E = in.E, stride = padded(E), M = in.streams.size(), slots = M + 2;
  const std::vector<float> weight = padded_row(in.norm_weight, 1.0f, E);
  const bool any_table =
      grads.token || std::any_of(grads.tables.begin(), grads.tables.end(), [](const float* t) { return t != nullptr; });
  const int64_t chunk_rows = any_table ? kChunkRows : std::max(kChunkRows, (in.T + kChunks - 1) / kChunks);
  const int64_t block_rows = std::min(chunk_rows * kChunks, in.T);
  const int64_t chunks = (block_rows + chunk_rows - 1) / chunk_rows;
  std::vector<float> partials(chunks * slots * stride, 0.0f);
  const std::unique_ptr<float[]> kept(any_table ? new float[block_rows * stride] : nullptr);
  const int64_t column_tasks = (E + kColumns - 1) / kColumns;
  std::atomic<int64_t> bad{-1};

  for (int64_t start = 0; start < in.T; start += block_rows) {
    const int64_t stop = std::min(start + block_rows, in.T);
    parallel((stop - start + chunk_rows - 1) / chunk_rows, 1, [&](int64_t first, int64_t last) {
      std::vector<float> scratch(3 * stride);
      for (int64_t c = first; c < last; ++c) {
        const int64_t begin = start + c * chunk_rows, end = std::min(begin + chunk_rows, stop);
        float* dx = any_table ? kept.get() + c * chunk_rows * stride : scratch.data() + 2 * stride;
        const int64_t found =
            backward_rows(in, grads, weight.data(), scratch.data(), partials.data() + c * slots * stride, dx,
                          any_table ? stride : 0, begin, end);
        if (found >= 0) bad = found;
      }
    });
    if (bad >= 0) return describe(in, bad);
    if (!any_table) continue;
    const bool small = (stop - start) * E < 32768;
    parallel(column_tasks, small ? column_tasks : 1, [&](int64_t first, int64_t last) {
      const int64_t from = first * kColumns, to = std::min(last * kColumns, E);
      for (int64_t column = from; column < to; column += kColumns) {
        add_to_tables(in, grads, kept.get(), start, stop, column, std::min(kColumns, to - column));
      }
    });
  }

  for (int64_t slot = 0; slot < slots; ++slot) {
    float* to = slot < M ? (grads.modality ? grads.modality + slot * E : nullptr)
                         : (slot == M ? grads.norm_weight : grads.norm_bias);
    if (to == nullptr) continue;
    std::fill(to, to + E, 0.0f);
    for (int64_t c = 0; c < chunks; ++c) add_rows(to, partials.data() + (c * slots + slot) * stride, E);
  }
  return "";
}

}  // namespace mm::cpu::embed
