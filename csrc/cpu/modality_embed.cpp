// Forward of modality_embed.h.   A row is summed, normalised and dropped out in place where the result is fp32 and
// small, else in a scratch row that stays in the first-level cache.
#include "cpu/modality_embed.h"

#include <atomic>
#include <cmath>

#include "cpu/modality_embed_rows.h"

namespace mm::cpu::embed {
namespace {

// Results beyond the last-level cache are written around it: the lines need not be read first.
constexpr int64_t kPastCacheBytes = int64_t{16} << 20;

constexpr int64_t kAhead = 4;  // rows

// x -> (x - mean) * rstd * weight + bias in place; returns rstd.  x is padded to whole vectors, or E is a multiple.
MM_INLINE float normalize_row(float* x, float mean, float eps, const float* weight, const float* bias, int64_t E) {
  for (int64_t e = E; e % kLanes; ++e) x[e] = mean;  // the padding adds nothing to the variance
  const F32x8 centre = splat(mean);
  F32x8 squares[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  int64_t e = 0;
  for (; e + 4 * kLanes <= E; e += 4 * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const F32x8 centered = load(x + e + i * kLanes) - centre;
      squares[i] += centered * centered;
    }
  }
  for (; e < E; e += kLanes) {
    const F32x8 centered = load(x + e) - centre;
    squares[0] += centered * centered;
  }
  const float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  const float rstd = 1.0f / std::sqrt(total / static_cast<float>(E) + eps);
  const F32x8 scale = splat(rstd);
  for (e = 0; e < E; e += kLanes) store(x + e, (load(x + e) - centre) * scale * load(weight + e) + load(bias + e));
  return rstd;
}

struct Outputs {
  Rows out;
  float *mean, *rstd;
  bool in_place, past_cache;
};

// Returns the first token that points outside, or -1.
MM_CLONES int64_t forward_rows(const Inputs& in, const Outputs& to, const float* weight, const float* bias,
                               float* scratch, int64_t begin, int64_t end) {
  Token token, ahead;
  for (int64_t t = begin; t < end; ++t) {
    if (!locate(in, t, token)) return t;
    if (!locate(in, std::min(t + kAhead, end - 1), ahead)) ahead = token;
    float* x = to.in_place ? static_cast<float*>(to.out.data) + t * in.E : scratch;
    const float total = sum_token(in, token, x, {ahead.row, ahead.kind});
    if (in.norm != Norm::kNone) {
      const float mean = in.norm == Norm::kLayer ? total / static_cast<float>(in.E) : 0.0f;
      if (in.norm == Norm::kLayer) to.mean[t] = mean;
      to.rstd[t] = normalize_row(x, mean, in.eps, weight, bias, in.E);
    }
    if (in.dropout.on) dropout_row(in.dropout, t, x, in.E);
    if (to.past_cache) {
      store_row<true>(to.out, t, x, in.E);
    } else if (!to.in_place) {
      store_row<false>(to.out, t, x, in.E);
    }
  }
  fence_past_cache();
  return -1;
}

}  // namespace

std::string forward(const Inputs& in, Rows out, float* mean, float* rstd, const Parallel& parallel) {
  const std::vector<float> weight = padded_row(in.norm_weight, 1.0f, in.E), bias = padded_row(in.norm_bias, 0.0f, in.E);
  const int64_t bytes = row_bytes(out.kind, in.E);
  const bool aligned = bytes % 16 == 0 && reinterpret_cast<uintptr_t>(out.data) % 16 == 0;
  const bool past_cache = aligned && in.T * bytes >= kPastCacheBytes;
  const bool in_place = !past_cache && out.kind == Kind::kF32 && in.E % kLanes == 0;
  const Outputs to{out, mean, rstd, in_place, past_cache};
  std::atomic<int64_t> bad{-1};
  const int64_t grain = std::max<int64_t>(1, kSerialElements / std::max<int64_t>(1, in.E));
  parallel(in.T, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(in_place ? 0 : padded(in.E));
    const int64_t found = forward_rows(in, to, weight.data(), bias.data(), scratch.data(), begin, end);
    if (found >= 0) bad = found;
  });
  return bad < 0 ? "" : describe(in, bad);
}

}  // namespace mm::cpu::embed
