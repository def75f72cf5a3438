// Products of small matrices that lie in a cache: C (+)= A B or A^T B, C in fp32.   Register tiles of kRows x kVecs
// vectors; K counts words of A and B
// For attention_kernels.h alone, which is compiled once per instruction set.
#pragma once

#include "attention_ahead.h"

namespace mm::cpu::attention::MM_ISA {

// Sums, rows and a word leave no register free where there are 16: steps written out in a row would spill some.
constexpr int kStepsUnrolled = W == 16 ? Ahead::kWordsPerStep : 1;

using Micro = void (*)(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t K,
                       float factor, Ahead& ahead);

// c[i, j] (+)= sum over k < K of a[i, k] b[k, j], for ROWS rows and VECS vectors; TRANSPOSED: of a[k, i] b[k, j].
// Times `factor` where words are of bf16.
template <bool TRANSPOSED, bool ADD, int ROWS, int VECS>
__attribute__((noinline)) void micro(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                                     int64_t K, [[maybe_unused]] float factor, Ahead& ahead) {
  V sums[ROWS][VECS] = {};
  const auto add = [&](int64_t k) __attribute__((always_inline)) {
    V row[VECS];
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) row[j] = load(b + k * ldb + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Word x = load_word(TRANSPOSED ? a + k * lda + i : a + i * lda + k);
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) sums[i][j] = add_products(sums[i][j], x, row[j]);
    }
  };
  int64_t k = 0;
  for (; k + Ahead::kWordsPerStep <= K; k += Ahead::kWordsPerStep) {
    ahead.fetch_some();
#pragma GCC unroll kStepsUnrolled
    for (int64_t next = 0; next < Ahead::kWordsPerStep; ++next) add(k + next);
  }
  for (; k < K; ++k) add(k);
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) {
      float* at = c + i * ldc + j * W;
      if constexpr (kTerms == 2) sums[i][j] *= factor;
      store(at, ADD ? load(at) + sums[i][j] : sums[i][j]);
    }
}

template <bool TRANSPOSED, bool ADD, int... ROW>
MM_INLINE Micro choose(int64_t rows, int64_t vecs, std::integer_sequence<int, ROW...>) {
  static constexpr Micro table[][kVecs] = {{micro<TRANSPOSED, ADD, ROW + 1, 1>, micro<TRANSPOSED, ADD, ROW + 1, 2>}...};
  return table[rows - 1][vecs - 1];
}

template <bool TRANSPOSED, bool ADD>
void multiply_part(int64_t rows, int64_t vecs, int64_t K, const float* a, int64_t lda, const float* b, int64_t ldb,
                   int64_t panel, float* c, int64_t ldc, float factor, Ahead& ahead) {
  const int64_t parts = (rows + kRows - 1) / kRows;
  const int64_t some = rows / parts, longer = rows % parts;  // the first `longer` parts have one row more
  constexpr auto sizes = std::make_integer_sequence<int, kRows>{};
  for (int64_t j = 0; j < vecs; j += kVecs, b += panel, c += kPanel) {
    const int64_t now = least(kVecs, vecs - j);
    const Micro more = longer ? choose<TRANSPOSED, ADD>(some + 1, now, sizes) : nullptr;
    const Micro less = choose<TRANSPOSED, ADD>(some, now, sizes);
    for (int64_t i = 0, part = 0; part < parts; ++part) {
      const bool one_more = part < longer;
      (one_more ? more : less)(a + i * (TRANSPOSED ? 1 : lda), lda, b, ldb, c + i * ldc, ldc, K, factor, ahead);
      i += some + one_more;
    }
  }
}

constexpr int64_t kDepth = 128;  // words in one chain of additions: long chains lose digits

// B is [K, vecs W] in panels of kPanel columns: panel p starts at b + p * panel, its rows lie ldb apart.
template <bool TRANSPOSED, bool ADD>
void multiply(int64_t rows, int64_t vecs, int64_t K, const float* a, int64_t lda, const float* b, int64_t ldb,
              int64_t panel, float* c, int64_t ldc, float factor, Ahead& ahead) {
  if (rows <= 0 || K <= 0) return;
  const int64_t parts = (K + kDepth - 1) / kDepth;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t from = part * K / parts, depth = (part + 1) * K / parts - from;
    const float* a_part = a + from * (TRANSPOSED ? lda : 1);
    if (part == 0)
      multiply_part<TRANSPOSED, ADD>(rows, vecs, depth, a_part, lda, b, ldb, panel, c, ldc, factor, ahead);
    else
      multiply_part<TRANSPOSED, true>(rows, vecs, depth, a_part, lda, b + from * ldb, ldb, panel, c, ldc, factor,
                                      ahead);
  }
}

}  // namespace mm::cpu::attention::MM_ISA
