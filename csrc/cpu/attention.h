// Packed attention on the CPU.   Tq, Tk tokens, H heads, G key/value heads, D head width, Mq, Mk modalities
//
// The mathematics is that of mmkernels/ops/attention/reference.py.  Work is cut into tasks that share nothing, each
// done by one thread in one order: results depend neither on the number of threads nor on who does what.
#pragma once

#include <cstdint>
#include <functional>

#include "dtypes.h"

namespace mm::cpu::attention {

// [T, heads, D]: contiguous inside a head, any stride between tokens and heads.
struct Heads {
  char* data;
  int64_t token, head;  // bytes
  MM_INLINE char* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

struct Inputs {
  Heads q, k, v;
  DType dtype;  // of q, k, v, out and their gradients; not fp64
  int64_t H, G, D, Tq, Tk, Mq, Mk;
  const int32_t *kv_lo, *kv_hi, *q_bits, *q_modality;  // [Tq], of the MaskPlan
  const int32_t *q_lo, *q_hi, *k_bits, *k_modality;    // [Tk]
  bool has_visible;                                    // bits matter
  float scale;
  const float* bias;  // [H, Mq, Mk] or null
  bool dropout;
  uint32_t threshold;  // a Philox word below it drops its probability
  float keep_scale;    // 1 / (1 - dropout_p)
  uint32_t seed[2], offset;
  MM_INLINE int64_t group() const { return H / G; }
};

struct Forward {
  Inputs in;
  const int32_t* tiles;  // [num_tiles, 4], heaviest first: first query, last (exclusive), first span, last (exclusive)
  const int32_t* spans;  // [., 3]: first key, last (exclusive), and a flag that is not needed here
  int64_t num_tiles, tile_rows;
  Heads out;
  float* lse;   // [H, Tq] or null
  float* mass;  // [Tq, H, Mk] or null
};

struct Backward {
  Inputs in;
  // [num_samples, 4], heaviest first: first query, last (exclusive), first key, last (exclusive)
  const int32_t* samples;
  int64_t num_samples;
  Heads out, dout, dq, dk, dv;
  const float *lse, *dlse;  // [H, Tq]; dlse may be null
  float* dbias;             // [H, Mq, Mk] or null
};

// Whether the rounding of `out` would show in delta = rowsum(do out), as it does in dbias, a sum over all of ds: then
// each row's delta is summed from its scores, for which a task must have all of the sample's keys.
MM_INLINE bool exact_delta(const Backward& b) { return b.dbias != nullptr; }

// A key range of one sample and one key head.  A sample with more than one chunk leaves its dq in `partial`, one
// [queries, group, D] per chunk, to be summed in order.
struct BackwardTask {
  int64_t sample, kv_head, key_begin, key_end;
  float* partial;  // null: dq is written at once
  double* dbias;   // [group, Mq, Mk] or null
};

// What is compiled once per instruction set.  Sizes are in floats; scratch is aligned to 64 bytes.
// `following` is what the same thread does next, or kNone: its rows are fetched into the cache in the meantime.
constexpr int64_t kNone = -1;
struct Kernels {
  int64_t (*forward_scratch)(const Forward&);
  void (*forward)(const Forward&, int64_t task, int64_t following, float* scratch);  // tile * H + head
  int64_t (*backward_scratch)(const Backward&, int64_t max_queries, int64_t max_keys);
  void (*backward)(const Backward&, const BackwardTask&, const BackwardTask* following, float* scratch);
  int terms;  // of a product's vectors: floats, or bf16 where they are multiplied as they are
};
extern const Kernels kBaseline;
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define MM_ATTENTION_X86 1
extern const Kernels kAvx2, kAvx512, kAvx512Bf16;  // the last for bf16 alone
#endif

// body(begin, end) over [0, n) on the caller's threads.
using Parallel = std::function<void(int64_t n, const std::function<void(int64_t, int64_t)>& body)>;

void forward(const Forward& problem, const Parallel& parallel);
void backward(const Backward& problem, const Parallel& parallel);
int terms(DType dtype);  // of a product's vectors, in the kernels that run on this CPU

}  // namespace mm::cpu::attention
