// Eight fp32 lanes, and how fp32, bf16 and fp16 rows get in and out of them.   Compiler vectors, with SSE2 intrinsics
// where these have no word for it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cpu/dtypes.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // all of these are inlined: no vector crosses a call

namespace mm::cpu::simd {

constexpr int kLanes = 8;

using F32x8 = float __attribute__((vector_size(32)));
using U32x8 = uint32_t __attribute__((vector_size(32)));
using U16x8 = uint16_t __attribute__((vector_size(16)));

template <class To, class From>
MM_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

MM_INLINE F32x8 splat(float x) { return x - F32x8{}; }  // one broadcast; eight initialisers become eight insertions
MM_INLINE U32x8 splat(uint32_t x) { return x - U32x8{}; }

MM_INLINE F32x8 widen(const F32x8& x, float) { return x; }

MM_INLINE F32x8 widen(const U16x8& x, BFloat16) { return bits_as<F32x8>(__builtin_convertvector(x, U32x8) << 16); }

MM_INLINE F32x8 widen(const U16x8& x, Float16) {
  const U32x8 h = __builtin_convertvector(x, U32x8);
  const U32x8 magnitude = h & 0x7fffu;
  // 2^112 moves the exponent bias from 15 to 127, and turns subnormals into normals on the way.
  F32x8 value = bits_as<F32x8>(magnitude << 13) * splat(0x1p112f);
  const U32x8 special = bits_as<U32x8>(magnitude >= splat(0x7c00u)) & 0x7f800000u;  // infinity and NaN
  return bits_as<F32x8>(bits_as<U32x8>(value) | special | ((h & 0x8000u) << 16));
}

MM_INLINE F32x8 narrow(const F32x8& x, float) { return x; }

// To nearest even, like torch.
MM_INLINE U16x8 narrow(const F32x8& x, BFloat16) {
  const U32x8 u = bits_as<U32x8>(x);
  const U32x8 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const U32x8 nan = bits_as<U32x8>((u & 0x7fffffffu) > splat(0x7f800000u));
  return __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), U16x8);
}

// Likewise: an fp32 addition rounds at the right bit.
MM_INLINE U16x8 narrow(const F32x8& x, Float16) {
  const U32x8 u = bits_as<U32x8>(x);
  const U32x8 sign = u & 0x80000000u;
  const F32x8 magnitude = bits_as<F32x8>(u ^ sign);
  F32x8 base = (magnitude * splat(0x1p112f)) * splat(0x1p-110f);  // overflows to infinity where fp16 does
  const U32x8 shifted = u + u;
  U32x8 bias = shifted & 0xff000000u;
  const U32x8 small = bits_as<U32x8>(bias < splat(0x71000000u));
  bias = (small & 0x71000000u) | (~small & bias);
  base = bits_as<F32x8>((bias >> 1) + 0x07800000u) + base;
  const U32x8 rounded = bits_as<U32x8>(base);
  const U32x8 finite = ((rounded >> 13) & 0x7c00u) + (rounded & 0xfffu);
  const U32x8 nan = bits_as<U32x8>(shifted > splat(0xff000000u));
  return __builtin_convertvector((sign >> 16) | (nan & 0x7e00u) | (~nan & finite), U16x8);
}

template <class T>
struct Storage {
  using type = U16x8;
};
template <>
struct Storage<float> {
  using type = F32x8;
};

template <class T>
MM_INLINE F32x8 load(const T* from) {
  typename Storage<T>::type raw;
  std::memcpy(&raw, from, sizeof(raw));
  return widen(raw, T{});
}

template <class T>
MM_INLINE void store(T* to, const F32x8& x) {
  const auto raw = narrow(x, T{});
  std::memcpy(to, &raw, sizeof(raw));
}

// Writes around the caches: for results too large to be found there again.  `to` is aligned to 16 bytes, and a fence
// must follow before another thread reads.
template <class T>
MM_INLINE void store_past_cache(T* to, const F32x8& x) {
  const auto raw = narrow(x, T{});
#if defined(__SSE2__)
  __m128i parts[sizeof(raw) / sizeof(__m128i)];
  std::memcpy(parts, &raw, sizeof(raw));
  for (size_t i = 0; i < sizeof(raw) / sizeof(__m128i); ++i)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, parts[i]);
#else
  std::memcpy(to, &raw, sizeof(raw));
#endif
}

MM_INLINE void fence_past_cache() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Asks for some memory before it is needed.
MM_INLINE void prefetch(const void* from, int64_t bytes) {
  constexpr int64_t kLine = 64;
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(from) + i);
}

// The first n <= 8 lanes; the others read as zero and are not written.
template <class T>
MM_INLINE F32x8 load_tail(const T* from, int64_t n) {
  T padded[kLanes] = {};
  std::memcpy(padded, from, n * sizeof(T));
  return load(padded);
}

template <class T>
MM_INLINE void store_tail(T* to, const F32x8& x, int64_t n) {
  T padded[kLanes];
  store(padded, x);
  std::memcpy(to, padded, n * sizeof(T));
}

MM_INLINE float sum(const F32x8& x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

// The high and low words of the 64-bit products x * factor.
MM_INLINE void multiply(const U32x8& x, uint32_t factor, U32x8& high, U32x8& low) {
#if defined(__SSE2__)
  __m128i in[2], out[4];  // high, low
  std::memcpy(in, &x, sizeof(in));
  const __m128i by = _mm_set1_epi64x(factor), lower = _mm_set1_epi64x(0xffffffff);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m128i even = _mm_mul_epu32(in[i], by), odd = _mm_mul_epu32(_mm_srli_epi64(in[i], 32), by);
    out[i] = _mm_or_si128(_mm_srli_epi64(even, 32), _mm_andnot_si128(lower, odd));
    out[i + 2] = _mm_or_si128(_mm_and_si128(lower, even), _mm_slli_epi64(odd, 32));
  }
  std::memcpy(&high, out, sizeof(high));
  std::memcpy(&low, out + 2, sizeof(low));
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint64_t product = uint64_t{factor} * x[lane];
    high[lane] = static_cast<uint32_t>(product >> 32);
    low[lane] = static_cast<uint32_t>(product);
  }
#endif
}

// Philox 4x32-10 of eight counters (column, row, 0, offset); the same words as mmkernels/philox.py.
MM_INLINE void philox(const U32x8& column, const U32x8& row, uint32_t offset, uint32_t k0, uint32_t k1, U32x8* words) {
  U32x8 c0 = column, c1 = row, c2 = splat(0u), c3 = splat(offset);
  for (int round = 0; round < 10; ++round) {
    U32x8 high0, low0, high2, low2;
    multiply(c0, 0xD2511F53u, high0, low0);
    multiply(c2, 0xCD9E8D57u, high2, low2);
    c0 = high2 ^ c1 ^ splat(k0);
    c1 = low2;
    c2 = high0 ^ c3 ^ splat(k1);
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

}  // namespace mm::cpu::simd
