// Eight fp32 lanes, and how fp32, bf16 and fp16 rows get in and out of them.   No intrinsics: compiler vectors.
#pragma once

#include <cstdint>
#include <cstring>

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

MM_INLINE F32x8 splat(float x) { return F32x8{x, x, x, x, x, x, x, x}; }
MM_INLINE U32x8 splat(uint32_t x) { return U32x8{x, x, x, x, x, x, x, x}; }

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

// The first n < 8 lanes; the others read as zero and are not written.
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

}  // namespace mm::cpu::simd
