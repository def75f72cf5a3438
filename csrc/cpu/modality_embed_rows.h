// One packed row of modality_embed: where its numbers are, their sum, and how rows get in and out of fp32.
// E width.   Scratch rows are padded to whole vectors; rows of tensors are not.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/modality_embed.h"
#include "cpu/modality_embed_simd.h"

namespace mm::cpu::embed {

using namespace simd;

constexpr int kMaxTables = 3;
constexpr int64_t kSerialElements = 65536;  // less work than this is not worth a second thread

inline int64_t padded(int64_t E) { return (E + kLanes - 1) / kLanes * kLanes; }

// `values`, or `otherwise` everywhere, padded with zeros.
inline std::vector<float> padded_row(const float* values, float otherwise, int64_t E) {
  std::vector<float> row(padded(E), 0.0f);
  for (int64_t e = 0; e < E; ++e) row[e] = values ? values[e] : otherwise;
  return row;
}

// Where one token's numbers are.
struct Token {
  const void* row;
  Kind kind;
  int64_t modality, table_row, stream_row;  // table_row or stream_row is -1
  int num_tables;
  int64_t table[kMaxTables], position[kMaxTables];
};

MM_INLINE int64_t row_bytes(Kind kind, int64_t E) { return E * (kind == Kind::kF32 ? 4 : 2); }

MM_INLINE char* row_at(const Rows& rows, int64_t index, int64_t E) {
  return static_cast<char*>(rows.data) + index * row_bytes(rows.kind, E);
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

inline std::string describe(const Inputs& in, int64_t t) {
  return "modality_embed: token " + std::to_string(t) + " of modality " + std::to_string(in.modality_ids[t]) +
         " with source row " + std::to_string(in.source_rows[t]) +
         " points outside its stream, token table or position table";
}

template <int kTables, class Source, class Table>
MM_INLINE F32x8 sum_at(const Source* source, const Table* modality, const Table* const* tables, int64_t e) {
  F32x8 value = load(source + e) + load(modality + e);
#pragma GCC unroll 3
  for (int j = 0; j < kTables; ++j) value += load(tables[j] + e);
  return value;
}

// A row that is needed soon.  Its lines are asked for one by one beside the work on another row: all at once would fill
// the queue of misses.  The CPU's own prefetcher finds no pattern, as rows of one packed sequence lie apart.
struct Soon {
  const char* row;
  int64_t size;  // of a number

  MM_INLINE Soon(const void* row, Kind kind) : row(static_cast<const char*>(row)), size(kind == Kind::kF32 ? 4 : 2) {}
  // To be called for every sixteenth column: a line of fp32.
  template <bool kWrite = false>
  MM_INLINE void ask(int64_t e) const {
    __builtin_prefetch(row + size * e, kWrite);
  }
};

// x = source + modality row + position rows, and the sum over the row.  Writes whole vectors where E has a tail.
// Asks for the row `soon` on the way.
template <int kTables, class Source, class Table>
MM_INLINE float sum_rows(const Source* source, const Table* modality, const Table* const* tables, float* x, int64_t E,
                         const Soon& soon) {
  F32x8 even = splat(0.0f), odd = splat(0.0f);  // two, so that additions need not wait for each other
  int64_t e = 0;
  for (; e + 2 * kLanes <= E; e += 2 * kLanes) {
    soon.ask(e);
    const F32x8 first = sum_at<kTables>(source, modality, tables, e);
    const F32x8 second = sum_at<kTables>(source, modality, tables, e + kLanes);
    store(x + e, first);
    store(x + e + kLanes, second);
    even += first;
    odd += second;
  }
  for (; e < E; e += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, E - e);
    F32x8 value = load_tail(source + e, n) + load_tail(modality + e, n);
    for (int j = 0; j < kTables; ++j) value += load_tail(tables[j] + e, n);
    store(x + e, value);
    even += value;
  }
  return sum(even + odd);
}

template <class Source, class Table>
MM_INLINE float sum_rows(const Source* source, const Table* modality, const Table* const* tables, int count, float* x,
                         int64_t E, const Soon& soon) {
  switch (count) {
    case 0:
      return sum_rows<0>(source, modality, tables, x, E, soon);
    case 1:
      return sum_rows<1>(source, modality, tables, x, E, soon);
    case 2:
      return sum_rows<2>(source, modality, tables, x, E, soon);
    default:
      return sum_rows<3>(source, modality, tables, x, E, soon);
  }
}

template <class Table>
MM_INLINE float sum_token_as(const Inputs& in, const Token& token, float* x, const Soon& soon) {
  const auto* modality = reinterpret_cast<const Table*>(row_at(in.modality, token.modality, in.E));
  const Table* tables[kMaxTables] = {};
  for (int j = 0; j < token.num_tables; ++j) {
    tables[j] = reinterpret_cast<const Table*>(row_at(in.tables[token.table[j]], token.position[j], in.E));
  }
  switch (token.kind) {
    case Kind::kF32:
      return sum_rows(static_cast<const float*>(token.row), modality, tables, token.num_tables, x, in.E, soon);
    case Kind::kBF16:
      return sum_rows(static_cast<const BFloat16*>(token.row), modality, tables, token.num_tables, x, in.E, soon);
    default:
      return sum_rows(static_cast<const Float16*>(token.row), modality, tables, token.num_tables, x, in.E, soon);
  }
}

MM_INLINE float sum_token(const Inputs& in, const Token& token, float* x, const Soon& soon) {
  switch (in.modality.kind) {
    case Kind::kF32:
      return sum_token_as<float>(in, token, x, soon);
    case Kind::kBF16:
      return sum_token_as<BFloat16>(in, token, x, soon);
    default:
      return sum_token_as<Float16>(in, token, x, soon);
  }
}

template <bool kPastCache, class Out>
MM_INLINE void store_row(Out* out, const float* x, int64_t E) {
  int64_t e = 0;
  for (; e + kLanes <= E; e += kLanes) {
    if constexpr (kPastCache) {
      store_past_cache(out + e, load(x + e));
    } else {
      store(out + e, load(x + e));
    }
  }
  if (e < E) store_tail(out + e, load(x + e), E - e);
}

template <bool kPastCache>
MM_INLINE void store_row(const Rows& out, int64_t index, const float* x, int64_t E) {
  char* row = row_at(out, index, E);
  switch (out.kind) {
    case Kind::kF32:
      return store_row<kPastCache>(reinterpret_cast<float*>(row), x, E);
    case Kind::kBF16:
      return store_row<kPastCache>(reinterpret_cast<BFloat16*>(row), x, E);
    default:
      return store_row<kPastCache>(reinterpret_cast<Float16*>(row), x, E);
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

// x[e] *= scale where (t, e) is kept, else 0.
constexpr int64_t kDropoutColumns = 4 * kLanes;

MM_INLINE void dropout_row(const Dropout& dropout, int64_t t, float* x, int64_t E) {
  for (int64_t e = 0; e < E; e += kDropoutColumns) {
    U32x8 words[4];
    philox(splat(static_cast<uint32_t>(e / 4)) + U32x8{0, 1, 2, 3, 4, 5, 6, 7}, splat(static_cast<uint32_t>(t)),
           dropout.offset, dropout.key[0], dropout.key[1], words);
    const int64_t n = std::min(kDropoutColumns, E - e);
    float factor[kDropoutColumns];
    for (int i = 0; i < 4; ++i) {
      for (int lane = 0; lane < kLanes; ++lane) {
        factor[4 * lane + i] = words[i][lane] >= dropout.threshold ? dropout.scale : 0.0f;
      }
    }
    if (n == kDropoutColumns) {
      for (int64_t i = 0; i < kDropoutColumns; i += kLanes) store(x + e + i, load(x + e + i) * load(factor + i));
    } else {
      for (int64_t i = 0; i < n; ++i) x[e + i] *= factor[i];
    }
  }
}

}  // namespace mm::cpu::embed
