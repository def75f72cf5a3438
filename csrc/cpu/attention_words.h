// What products multiply: words of 32 bits, which are a float each, or (MM_TERMS 2) two bf16 that follow one another in
// the sum.  Words of bf16 lie in buffers of floats; nothing may compute with them as floats, which could change them.
// For attention_kernels.h alone, which is compiled once per instruction set.
#pragma once

#include "attention_simd.h"

#if MM_TERMS == 2
#include <immintrin.h>
#endif

namespace mm::cpu::attention::MM_ISA {

constexpr int kTerms = MM_TERMS;  // of a word
constexpr int64_t words(int64_t terms) { return (terms + kTerms - 1) / kTerms; }

#if MM_TERMS == 2

using Word = int32_t;
using Half = uint16_t __attribute__((vector_size(W * 2)));

// sum + x row, both terms of each word.
MM_INLINE V add_products(const V& sum, Word x, const V& row) {
  return bits_as<V>(_mm512_dpbf16_ps(bits_as<__m512>(sum), bits_as<__m512bh>(splat(x)), bits_as<__m512bh>(row)));
}

MM_INLINE Half narrow(const V& x) { return bits_as<Half>(_mm512_cvtneps_pbh(bits_as<__m512>(x))); }

MM_INLINE V weave(const Half& first, const Half& second) {
  return bits_as<V>(__builtin_convertvector(first, U) | __builtin_convertvector(second, U) << 16);
}

#else

using Word = float;
MM_INLINE V add_products(const V& sum, Word x, const V& row) { return sum + x * row; }

#endif

MM_INLINE Word load_word(const float* p) {
  Word word;
  std::memcpy(&word, p, sizeof(word));
  return word;
}

}  // namespace mm::cpu::attention::MM_ISA
