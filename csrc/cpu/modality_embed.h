// Modality embedding on CPU, forward and backward.   T tokens, E width, M modalities, A position axes.
// Plain memory in and out: nothing is allocated but scratch, and no torch header is needed.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace mm::cpu::embed {

enum class Kind : int8_t { kF32, kBF16, kF16, kI32, kI64 };
enum class Norm : int8_t { kNone, kLayer, kRms };

// rows x E numbers, or `rows` ids.
struct Rows {
  void* data = nullptr;  // null: absent, or a gradient that is not wanted
  int64_t rows = 0;
  Kind kind = Kind::kF32;
};

// Element (t, e) is kept where word e % 4 of Philox at counter (e / 4, t, 0, offset) is at least `threshold`.
struct Dropout {
  bool on = false;
  uint32_t threshold = 0, key[2] = {}, offset = 0;
  float scale = 1;  // of what is kept
};

struct Inputs {
  std::vector<Rows> streams;  // [M], floats or token ids
  Rows modality, token;
  std::vector<Rows> tables;      // position tables of all modalities, at most three each
  std::vector<int> first_table;  // [M + 1]: tables of modality m are first_table[m] .. first_table[m + 1]
  const float* norm_weight = nullptr;
  const float* norm_bias = nullptr;
  const uint8_t* modality_ids = nullptr;  // [T]
  const int32_t* source_rows = nullptr;   // [T]; negative: row -(r + 1) of the token table
  const int32_t* positions = nullptr;     // [A, T]
  int64_t T = 0, E = 0, A = 0;
  Norm norm = Norm::kLayer;
  float eps = 0;
  Dropout dropout;
};

// What follows rstd is written and not read; null where not wanted.
struct Grads {
  Rows out;                     // gradient of the result
  const float* mean = nullptr;  // [T], of forward; null for kRms
  const float* rstd = nullptr;
  std::vector<Rows> streams;
  float* modality = nullptr;  // [M, E]
  float* token = nullptr;     // [V, E]
  std::vector<float*> tables;
  float* norm_weight = nullptr;  // [E]
  float* norm_bias = nullptr;
};

// Calls body(begin, end) over parts of [0, n) in parallel; parts hold at least `grain` items.
using Parallel = std::function<void(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body)>;

// Both return an empty string, or what index was out of range (nothing outside the arrays is touched then).
// The results do not depend on how `parallel` divides the work.
std::string forward(const Inputs& in, Rows out, float* mean, float* rstd, const Parallel& parallel);
std::string backward(const Inputs& in, const Grads& grads, const Parallel& parallel);

}  // namespace mm::cpu::embed
