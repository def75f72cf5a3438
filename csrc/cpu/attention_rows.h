// Rows of queries, keys, values and gradients: into buffers as fp32 or as words of products, and out of them.
// For attention_kernels.h alone, which is compiled once per instruction set.
#pragma once

#include "attention.h"
#include "attention_words.h"

namespace mm::cpu::attention::MM_ISA {

template <typename T>
MM_INLINE void widen_row(const T* __restrict from, float factor, float* __restrict to, int64_t D) {
  for (int64_t d = 0; d < D; ++d) to[d] = mm::cpu::widen(from[d]) * factor;
}

template <typename T>
void read_rows_of(const Heads& x, int64_t begin, int64_t count, int64_t head, int64_t D, float factor, float* to,
                  int64_t ld) {
  const int64_t padded = round_up(D, W);
  for (int64_t i = 0; i < count; ++i, to += ld) {
    widen_row(reinterpret_cast<const T*>(x.at(begin + i, head)), factor, to, D);
    for (int64_t d = D; d < padded; ++d) to[d] = 0.0f;
  }
}

// Rows [begin, begin + count) of one head as fp32, times `factor`, ld apart, zero from D up to a whole vector.
inline void read_rows(DType dtype, const Heads& x, int64_t begin, int64_t count, int64_t head, int64_t D, float* to,
                      int64_t ld, float factor = 1.0f) {
  if (dtype == DType::kFloat32) return read_rows_of<float>(x, begin, count, head, D, factor, to, ld);
  if (dtype == DType::kBFloat16) return read_rows_of<BFloat16>(x, begin, count, head, D, factor, to, ld);
  read_rows_of<Float16>(x, begin, count, head, D, factor, to, ld);
}

template <typename T>
MM_INLINE void narrow_row(const float* __restrict from, float factor, T* __restrict to, int64_t D) {
  for (int64_t d = 0; d < D; ++d) to[d] = mm::cpu::narrow<T>(from[d] * factor);
}

// One row times `factor`, rounded once.
inline void write_row(DType dtype, const float* from, float factor, char* to, int64_t D) {
  if (dtype == DType::kFloat32) return narrow_row(from, factor, reinterpret_cast<float*>(to), D);
  if (dtype == DType::kBFloat16) return narrow_row(from, factor, reinterpret_cast<BFloat16*>(to), D);
  narrow_row(from, factor, reinterpret_cast<Float16*>(to), D);
}

// Transposed panels of rows of n words: to[p kPanel n + d kPanel + j] = rows[(p kPanel + j) ld + d], zero beyond
// `count` up to a vector.  The rows are padded to whole vectors.
inline void transpose_rows(const float* rows, int64_t ld, int64_t count, int64_t n, float* to) {
  for (int64_t j = 0; j < count; j += W) {
    const int64_t here = least(W, count - j);
    float* panel = to + j / kPanel * kPanel * n + j % kPanel;
    for (int64_t d = 0; d < n; d += W) {
      V tile[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) tile[i] = i < here ? load(rows + (j + i) * ld + d) : V{};
      transpose(tile);
      if (n - d >= W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(panel + (d + i) * kPanel, tile[i]);
      } else {
        for (int i = 0; i < n - d; ++i) store(panel + (d + i) * kPanel, tile[i]);
      }
    }
  }
}

#if MM_TERMS == 2

MM_INLINE Half load_half(const char* p, int64_t count) {
  Half v{};
  std::memcpy(&v, p, sizeof(uint16_t) * (count < W ? count : W));
  return v;
}

// Rows [begin, begin + count) of one head as words along the row, ld apart, zero up to a whole vector.
inline void read_words(const Inputs& in, const Heads& x, int64_t begin, int64_t count, int64_t head, float* to,
                       int64_t ld) {
  const int64_t used = sizeof(uint16_t) * in.D, padded = sizeof(float) * round_up(words(in.D), W);
  for (int64_t i = 0; i < count; ++i, to += ld) {
    std::memcpy(to, x.at(begin + i, head), used);
    std::memset(reinterpret_cast<char*>(to) + used, 0, padded - used);
  }
}

// Rows two by two: word d of row i / 2 is element d of rows i and i + 1; zero for a row beyond the last.
inline void read_woven(const Inputs& in, const Heads& x, int64_t begin, int64_t count, int64_t head, float* to,
                       int64_t ld) {
  for (int64_t i = 0; i < count; i += 2, to += ld) {
    const char* first = x.at(begin + i, head);
    const char* second = i + 1 < count ? x.at(begin + i + 1, head) : nullptr;
    for (int64_t d = 0; d < in.D; d += W) {
      const int64_t left = in.D - d;
      const Half other = second ? load_half(second + sizeof(uint16_t) * d, left) : Half{};
      store(to + d, weave(load_half(first + sizeof(uint16_t) * d, left), other));
    }
  }
}

// Floats [begin, end) of a row to words in their place: word j / 2 is that of floats j and j + 1.
MM_INLINE void narrow_in_place(float* row, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; j += W) {
    const Half narrowed = narrow(load(row + j));
    std::memcpy(row + j / 2, &narrowed, sizeof(narrowed));
  }
}

// Floats [begin, end) of two rows to words of both; `second` may be null.
MM_INLINE void weave_rows(const float* first, const float* second, int64_t begin, int64_t end, float* to) {
  for (int64_t j = begin; j < end; j += W)
    store(to + j, weave(narrow(load(first + j)), second ? narrow(load(second + j)) : Half{}));
}

#else  // floats are words as they are

inline void read_words(const Inputs& in, const Heads& x, int64_t begin, int64_t count, int64_t head, float* to,
                       int64_t ld) {
  read_rows(in.dtype, x, begin, count, head, in.D, to, ld);
}
inline void read_woven(const Inputs& in, const Heads& x, int64_t begin, int64_t count, int64_t head, float* to,
                       int64_t ld) {
  read_rows(in.dtype, x, begin, count, head, in.D, to, ld);
}
MM_INLINE void narrow_in_place(float*, int64_t, int64_t) {}
MM_INLINE void weave_rows(const float*, const float*, int64_t, int64_t, float*) {}

#endif

// Queries as words along the row.  Floats are scaled here; bf16 would be rounded, so that their products are scaled.
inline void read_queries(const Inputs& in, int64_t begin, int64_t count, int64_t head, float* to, int64_t ld) {
  if constexpr (kTerms == 1)
    read_rows(in.dtype, in.q, begin, count, head, in.D, to, ld, in.scale);
  else
    read_words(in, in.q, begin, count, head, to, ld);
}
MM_INLINE float scale_left(const Inputs& in) { return kTerms == 1 ? 1.0f : in.scale; }

}  // namespace mm::cpu::attention::MM_ISA
