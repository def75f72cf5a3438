// Moving and summing packed rows on the CPU.   T packed tokens, B samples, N segments, L padded length, R gathered
// rows, E elements of a row
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "packing_copy.h"

namespace mm::cpu {

// Rows of one 2-D tensor: contiguous inside a row, any stride between rows.
struct Rows {
  char* data;
  int64_t stride;  // bytes
  char* at(int64_t row) const { return data + row * stride; }
};

// Runs of packed rows and where each run lies elsewhere, in a stream or a padded sample.
struct Runs {
  const int64_t* bounds;  // [count + 1] first packed row of each run
  const Rows* elsewhere;  // [count]
  int64_t count;
  Rows packed;
  int64_t row_bytes;
  Store store;
};

// Every function below does tokens, rows or segments [begin, end) of its output, so that callers can split the work.

// packed <- elsewhere, for packed rows [begin, end).
void pack_rows(const Runs& runs, int64_t begin, int64_t end);
// elsewhere <- packed, for packed rows [begin, end).
void unpack_rows(const Runs& runs, int64_t begin, int64_t end);
// As unpack_rows, where elsewhere has `length` rows for each run: those beyond the run become zero, and mask [B,
// length] says which do not.  [begin, end) counts padded rows.
void pad_rows(const Runs& runs, int64_t length, bool* mask, int64_t begin, int64_t end);

// Whether every row is in [0, total).
template <typename Index>
bool in_range(const Index* rows, int64_t count, int64_t total);

// out[r] = packed[rows[r]]; rows are in range.
template <typename Index>
void gather_rows(Rows packed, const Index* rows, Rows out, int64_t row_bytes, Store store, int64_t begin, int64_t end);

// For each of `total` packed rows, the list of the gathered rows that came from it, in order: head[t], next[r], ...; -1
// ends.
template <typename Index>
void list_sources(const Index* rows, int64_t num_rows, int64_t total, int64_t* head, int64_t* next);

// out[t] = the sum of grad[r] over the list of t, in the accumulator type; zero where the list is empty.
void sum_listed_rows(Rows grad, const int64_t* head, const int64_t* next, Rows out, int64_t width, DType dtype,
                     Store store, int64_t begin, int64_t end);

// out[n] = mean of packed[bounds[n] : bounds[n + 1]], zero for an empty segment; sums run in token order.
void segment_mean(Rows packed, const int32_t* bounds, Rows out, int64_t width, DType dtype, int64_t begin, int64_t end);

// out[t] = grad[n] / length of n, for the tokens t of segments [begin, end).
void segment_mean_backward(Rows grad, const int32_t* bounds, Rows out, int64_t width, DType dtype, Store store,
                           int64_t begin, int64_t end);

}  // namespace mm::cpu
