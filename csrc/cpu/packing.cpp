// Moving and summing packed rows on the CPU.   T packed tokens, N segments, R gathered rows, E elements of a row
#include "packing.h"

#include <algorithm>
#include <cstring>

namespace mm::cpu {
namespace {

constexpr int64_t kStrip = 256;  // accumulators on the stack: a strip of columns stays in L1 while rows stream past

void copy_rows(Rows from, Rows to, int64_t count, int64_t row_bytes) {
  if (from.stride == row_bytes && to.stride == row_bytes) {
    std::memcpy(to.data, from.data, static_cast<size_t>(count * row_bytes));
    return;
  }
  for (int64_t i = 0; i < count; ++i) std::memcpy(to.at(i), from.at(i), static_cast<size_t>(row_bytes));
}

// Calls body(stream rows, packed rows, count) for each run of tokens in [begin, end) that shares a segment.
template <typename Body>
void for_each_run(const MoveRows& move, int64_t begin, int64_t end, const Body& body) {
  const int64_t* bounds = move.bounds;
  int64_t n = std::upper_bound(bounds, bounds + move.num_segments + 1, begin) - bounds - 1;
  for (int64_t token = begin; token < end; ++n) {
    const int64_t stop = std::min(bounds[n + 1], end);
    if (stop <= token) continue;  // an empty segment
    const int32_t* segment = move.segments + 4 * n;
    const Rows& stream = move.streams[segment[1]];
    const int64_t row = segment[3] + (token - bounds[n]);
    body(Rows{stream.at(row), stream.stride}, Rows{move.packed.at(token), move.packed.stride}, stop - token);
    token = stop;
  }
}

template <typename T>
MM_CLONES void add_strip(const T* __restrict row, Accumulator<T>* __restrict sums, int64_t width) {
  for (int64_t e = 0; e < width; ++e) sums[e] += widen(row[e]);
}

template <typename T>
MM_CLONES void store_strip(const Accumulator<T>* __restrict sums, Accumulator<T> divisor, T* __restrict row,
                           int64_t width) {
  for (int64_t e = 0; e < width; ++e) row[e] = narrow<T>(sums[e] / divisor);
}

template <typename T>
MM_CLONES void divide_strip(const T* __restrict from, Accumulator<T> divisor, T* __restrict to, int64_t width) {
  for (int64_t e = 0; e < width; ++e) to[e] = narrow<T>(widen(from[e]) / divisor);
}

template <typename T>
T* elements(const Rows& rows, int64_t row) {
  return reinterpret_cast<T*>(rows.at(row));
}

// body(T{}) with the element type that `dtype` names.
template <typename Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
    case DType::kFloat64:
      return body(double{});
  }
}

template <typename T>
void sum_list(Rows grad, const int64_t* next, int64_t first, T* out, int64_t width) {
  Accumulator<T> sums[kStrip];
  for (int64_t e = 0; e < width; e += kStrip) {
    const int64_t strip = std::min(kStrip, width - e);
    std::fill_n(sums, strip, Accumulator<T>{0});
    for (int64_t r = first; r >= 0; r = next[r]) add_strip<T>(elements<T>(grad, r) + e, sums, strip);
    store_strip<T>(sums, 1, out + e, strip);
  }
}

template <typename T>
void mean_of(Rows packed, int64_t begin, int64_t end, T* out, int64_t width) {
  Accumulator<T> sums[kStrip];
  const auto length = static_cast<Accumulator<T>>(std::max<int64_t>(end - begin, 1));
  for (int64_t e = 0; e < width; e += kStrip) {
    const int64_t strip = std::min(kStrip, width - e);
    std::fill_n(sums, strip, Accumulator<T>{0});
    for (int64_t t = begin; t < end; ++t) add_strip<T>(elements<T>(packed, t) + e, sums, strip);
    store_strip<T>(sums, length, out + e, strip);
  }
}

}  // namespace

void pack_rows(const MoveRows& move, int64_t begin, int64_t end) {
  for_each_run(move, begin, end,
               [&](Rows stream, Rows packed, int64_t count) { copy_rows(stream, packed, count, move.row_bytes); });
}

void unpack_rows(const MoveRows& move, int64_t begin, int64_t end) {
  for_each_run(move, begin, end,
               [&](Rows stream, Rows packed, int64_t count) { copy_rows(packed, stream, count, move.row_bytes); });
}

template <typename Index>
void gather_rows(Rows packed, const Index* rows, Rows out, int64_t row_bytes, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) std::memcpy(out.at(r), packed.at(rows[r]), static_cast<size_t>(row_bytes));
}
template void gather_rows(Rows, const int32_t*, Rows, int64_t, int64_t, int64_t);
template void gather_rows(Rows, const int64_t*, Rows, int64_t, int64_t, int64_t);

template <typename Index>
void list_sources(const Index* rows, int64_t num_rows, int64_t total, int64_t* head, int64_t* next) {
  std::fill_n(head, total, int64_t{-1});
  for (int64_t r = num_rows - 1; r >= 0; --r) {  // backwards, so that each list runs forwards
    next[r] = head[rows[r]];
    head[rows[r]] = r;
  }
}
template void list_sources(const int32_t*, int64_t, int64_t, int64_t*, int64_t*);
template void list_sources(const int64_t*, int64_t, int64_t, int64_t*, int64_t*);

void sum_listed_rows(Rows grad, const int64_t* head, const int64_t* next, Rows out, int64_t width, DType dtype,
                     int64_t begin, int64_t end) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto row_bytes = static_cast<size_t>(width) * sizeof(T);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = head[t];
      if (first < 0) {
        std::memset(out.at(t), 0, row_bytes);
      } else if (next[first] < 0) {
        std::memcpy(out.at(t), grad.at(first), row_bytes);
      } else {
        sum_list<T>(grad, next, first, elements<T>(out, t), width);
      }
    }
  });
}

void segment_mean(Rows packed, const int32_t* bounds, Rows out, int64_t width, DType dtype, int64_t begin,
                  int64_t end) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t n = begin; n < end; ++n) mean_of<T>(packed, bounds[n], bounds[n + 1], elements<T>(out, n), width);
  });
}

void segment_mean_backward(Rows grad, const int32_t* bounds, Rows out, int64_t width, DType dtype, int64_t begin,
                           int64_t end) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t length = bounds[n + 1] - bounds[n];
      if (length <= 0) continue;
      T* first = elements<T>(out, bounds[n]);
      divide_strip<T>(elements<T>(grad, n), static_cast<Accumulator<T>>(length), first, width);
      for (int64_t t = bounds[n] + 1; t < bounds[n + 1]; ++t)
        std::memcpy(out.at(t), first, static_cast<size_t>(width) * sizeof(T));
    }
  });
}

}  // namespace mm::cpu
