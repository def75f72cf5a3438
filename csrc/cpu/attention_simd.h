// Vectors of W floats for the attention kernels: exp, Philox, transposition.   Compiler vectors, no intrinsics.
// For attention_kernels.h alone, which is compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "dtypes.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // all of these are inlined: no vector crosses a call

namespace mm::cpu::attention::MM_ISA {

constexpr int W = MM_LANES;     // floats of a vector
constexpr int kRows = MM_ROWS;  // register tile of a product: rows ...
constexpr int kVecs = 2;        // ... by vectors
constexpr int kPanel = kVecs * W;

using V = float __attribute__((vector_size(W * 4)));
using I = int32_t __attribute__((vector_size(W * 4)));
using U = uint32_t __attribute__((vector_size(W * 4)));
using U64 = uint64_t __attribute__((vector_size(W * 4)));

template <class To, class From>
MM_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

MM_INLINE V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
MM_INLINE I load(const int32_t* p) {
  I v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
MM_INLINE void store(float* p, const V& v) { std::memcpy(p, &v, sizeof(v)); }
MM_INLINE V splat(float x) { return x - V{}; }
MM_INLINE I splat(int32_t x) { return x - I{}; }
MM_INLINE U splat(uint32_t x) { return x - U{}; }
MM_INLINE V select(const I& yes, const V& a, const V& b) {
  return bits_as<V>((yes & bits_as<I>(a)) | (~yes & bits_as<I>(b)));
}
MM_INLINE V larger(const V& a, const V& b) { return a > b ? a : b; }  // b where one is NaN

// 0, 1, ..., W - 1.
template <int... E>
MM_INLINE I counted(std::integer_sequence<int, E...>) {
  return I{E...};
}
MM_INLINE I lane_numbers() { return counted(std::make_integer_sequence<int, W>{}); }

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
MM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
MM_INLINE int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

constexpr float kInfinity = __builtin_inff();

// v[(i + BY) % W] in lane i.
template <int BY, int... E>
MM_INLINE V rotate(const V& v, std::integer_sequence<int, E...>) {
  return __builtin_shufflevector(v, v, ((E + BY) % W)...);
}

// The lanes of one vector folded onto the first: halves, quarters, ...
template <int HALF = W / 2, typename Combine>
MM_INLINE float fold(const V& v, const Combine& combine) {
  if constexpr (HALF == 0)
    return v[0];
  else
    return fold<HALF / 2>(combine(v, rotate<HALF>(v, std::make_integer_sequence<int, W>{})), combine);
}

MM_INLINE float sum(const V& v) {
  return fold(v, [](const V& a, const V& b) { return a + b; });
}
MM_INLINE float largest(const V& v) {
  return fold(v, [](const V& a, const V& b) { return larger(a, b); });
}

// e^x for x <= 88, within 1 ulp; 0 below -87.7, for -inf too; NaN for NaN.
MM_INLINE V exp(V x) {
  x = larger(splat(-88.0f), x);
  // x = n ln 2 + r: adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const V shifted = x * 1.44269504088896341f + 12582912.0f;
  const V n = shifted - 12582912.0f;
  const V r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  V p = splat(1.381454007e-3f);  // minimax on [-ln 2 / 2, ln 2 / 2], error 4e-9
  p = p * r + 8.368745108e-3f;
  p = p * r + 4.166839079e-2f;
  p = p * r + 1.666652040e-1f;
  p = p * r + 0.4999999343f;
  p = (r * r) * p + r;
  const V power = bits_as<V>((bits_as<U>(shifted) + 127u) << 23);  // 2^n; 0 where n is -127
  return p * power + power;
}

template <int B, int... E>
MM_INLINE void exchange(V& x, V& y, std::integer_sequence<int, E...>) {
  const V first = __builtin_shufflevector(x, y, ((E & B) ? W + (E ^ B) : E)...);
  y = __builtin_shufflevector(x, y, ((E & B) ? W + E : (E ^ B))...);
  x = first;
}

template <int B>
MM_INLINE void transpose_stage(V* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if ((i & B) == 0) exchange<B>(rows[i], rows[i | B], std::make_integer_sequence<int, W>{});
}

// Rows to columns in place: each stage swaps one bit of the row index with the same bit of the column index.
MM_INLINE void transpose(V* rows) {
  transpose_stage<1>(rows);
  transpose_stage<2>(rows);
  if constexpr (W > 4) transpose_stage<4>(rows);
  if constexpr (W > 8) transpose_stage<8>(rows);
}

// The high and low words of the 64-bit products x * m.
MM_INLINE void wide_product(const U& x, uint32_t m, U& high, U& low) {
  const U64 pairs = bits_as<U64>(x);
  const U64 even = (pairs & 0xffffffffu) * m, odd = (pairs >> 32) * m;
  low = bits_as<U>((even & 0xffffffffu) | (odd << 32));
  high = bits_as<U>((even >> 32) | (odd & 0xffffffff00000000u));
}

// Philox 4x32-10 of W counters; the same words as mmkernels/philox.py.
MM_INLINE void philox(U c0, U c1, U c2, U c3, uint32_t k0, uint32_t k1, U* words) {
  for (int round = 0; round < 10; ++round) {
    U high0, low0, high2, low2;
    wide_product(c0, 0xD2511F53u, high0, low0);
    wide_product(c2, 0xCD9E8D57u, high2, low2);
    c0 = high2 ^ c1 ^ k0;
    c1 = low2;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

}  // namespace mm::cpu::attention::MM_ISA
