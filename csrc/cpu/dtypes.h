// Element types of CPU kernels (fp32, bf16, fp16, fp64), and the choice of vector width at run time.
#pragma once

#include <bit>
#include <cstdint>

// What is used at most where the CPU has it: 5 AVX-512 with products of bf16, 4 AVX-512, 3 AVX2, 1 the baseline of
// x86-64.  Less than 5 is for tests of what other CPUs run (tests/vector_widths.py).
#ifndef MM_X86_LEVEL
#define MM_X86_LEVEL 5
#endif
// A function marked MM_CLONES is compiled for AVX-512, AVX2 and the baseline; the loader picks one. What it calls must
// be MM_INLINE to be compiled along with it. Elsewhere (other compilers and CPUs) there is the baseline only.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#if MM_X86_LEVEL >= 4
#define MM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif MM_X86_LEVEL == 3
#define MM_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define MM_CLONES
#endif
#else
#define MM_CLONES
#endif
#if defined(__GNUC__)
#define MM_INLINE inline __attribute__((always_inline))
#else
#define MM_INLINE inline
#endif

namespace mm::cpu {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

// 16-bit floats as their bits; conversions are branch-free integer code, so that loops over them vectorise.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Sums of T are kept in Accumulator<T>.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

MM_INLINE float widen(float x) { return x; }
MM_INLINE double widen(double x) { return x; }
MM_INLINE float widen(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
MM_INLINE float widen(Float16 x) {
  const uint32_t magnitude = uint32_t{x.bits & 0x7fffu} << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;  // rebias; exact for subnormals too
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | (uint32_t{x.bits & 0x8000u} << 16));
}

// Round to nearest even, like torch.
template <typename T>
T narrow(Accumulator<T> x);
template <>
MM_INLINE float narrow<float>(float x) {
  return x;
}
template <>
MM_INLINE double narrow<double>(double x) {
  return x;
}
template <>
MM_INLINE BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
}
template <>
MM_INLINE Float16 narrow<Float16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Normal: rebias the exponent and round off 13 bits. Subnormal: adding 0.5 puts the rounded value in the low bits.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // rounds to infinity
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return {static_cast<uint16_t>(result | sign)};
}

}  // namespace mm::cpu
