// What a thread fetches while it computes: the rows of its next task.
// For attention_kernels.h alone, which is compiled once per instruction set.
#pragma once

#include "attention.h"
#include "attention_words.h"

namespace mm::cpu::attention::MM_ISA {

// Rows for the second-level cache, line by line between the steps of the products: they lie apart, a head's width in
// each token's row, where no hardware prefetcher finds them.  Many at once would wait for each other.
class Ahead {
 public:
  explicit Ahead(const Inputs& in) : D_(in.D), row_bytes_(in.D * (in.dtype == DType::kFloat32 ? 4 : 2)) {}

  void add(const Heads& x, int64_t begin, int64_t end, int64_t head) {
    end = least(end, begin + kMaxRows);
    if (begin >= end) return;
    ranges_[count_++] = {x.at(begin, head), x.token, end - begin};
    lines_ += (end - begin) * ((row_bytes_ + kLineBytes - 1) / kLineBytes);
  }

  // Over so many multiplications of D terms.
  void spread(int64_t multiplications) {
    const int64_t steps = multiplications * D_ / (kRows * kPanel * kTerms * kWordsPerStep);
    per_step_ = (lines_ + steps) / (steps + 1);
  }

  // Of a product's sum.  As timed with AVX-512 and AVX2: where a tile is smaller, a fetch's own work weighs more.
  static constexpr int kWordsPerStep = W == 16 ? 4 : 16;

  MM_INLINE void fetch_some() {
    for (int64_t i = 0; i < per_step_ && now_ < count_; ++i) {
      Range& range = ranges_[now_];
      __builtin_prefetch(range.next + byte_, 0, 2);
      byte_ += kLineBytes;
      if (byte_ < row_bytes_) continue;
      byte_ = 0;
      range.next += range.stride;
      if (--range.rows == 0) ++now_;
    }
  }

 private:
  static constexpr int64_t kLineBytes = 64;
  static constexpr int64_t kMaxRows = 256;  // of a range: more would push out what this task reads
  struct Range {
    const char* next;
    int64_t stride, rows;
  };
  Range ranges_[8];
  int64_t D_, row_bytes_, byte_ = 0, count_ = 0, now_ = 0, lines_ = 0, per_step_ = 0;
};

}  // namespace mm::cpu::attention::MM_ISA
