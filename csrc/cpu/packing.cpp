// See packing.h.
#include "packing.h"

#include <algorithm>

namespace mm::cpu {
namespace {

constexpr int64_t kStrip = 256;  // accumulators on the stack: a strip of columns stays in L1 while rows stream past

// How far ahead of the copy scattered rows are asked for: the hardware sees no pattern in where they begin.
constexpr int64_t kBytesAhead = 2048, kRowsAhead = 8, kBytesAsked = 1024;

void prefetch([[maybe_unused]] const char* row, [[maybe_unused]] int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < std::min(bytes, kBytesAsked); i += 64) __builtin_prefetch(row + i);
#endif
}

void copy_rows(Rows from, Rows to, int64_t count, int64_t row_bytes, Store store) {
  if (from.stride == row_bytes && to.stride == row_bytes) {
    copy_bytes(to.data, from.data, count * row_bytes, store);
    return;
  }
  for (int64_t i = 0; i < count; ++i) copy_bytes(to.at(i), from.at(i), row_bytes, store);
}

Rows from_row(const Rows& rows, int64_t row) { return {rows.at(row), rows.stride}; }

// Calls body(rows elsewhere, packed rows, count) for each stretch of packed rows [begin, end) that lies in one run.
template <typename Body>
void for_each_run(const Runs& runs, int64_t begin, int64_t end, const Body& body) {
  const int64_t* bounds = runs.bounds;
  int64_t n = std::upper_bound(bounds, bounds + runs.count + 1, begin) - bounds - 1;
  for (int64_t token = begin; token < end; ++n) {
    const int64_t stop = std::min(bounds[n + 1], end);
    if (stop <= token) continue;  // an empty run
    body(from_row(runs.elsewhere[n], token - bounds[n]), from_row(runs.packed, token), stop - token);
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

void pack_rows(const Runs& runs, int64_t begin, int64_t end) {
  for_each_run(runs, begin, end, [&](Rows elsewhere, Rows packed, int64_t count) {
    copy_rows(elsewhere, packed, count, runs.row_bytes, runs.store);
  });
  finish_stores(runs.store);
}

void unpack_rows(const Runs& runs, int64_t begin, int64_t end) {
  for_each_run(runs, begin, end, [&](Rows elsewhere, Rows packed, int64_t count) {
    copy_rows(packed, elsewhere, count, runs.row_bytes, runs.store);
  });
  finish_stores(runs.store);
}

void pad_rows(const Runs& runs, int64_t length, bool* mask, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end;) {
    const int64_t b = row / length, first = row % length, stop = std::min(length, first + (end - row));
    const int64_t filled = std::clamp(runs.bounds[b + 1] - runs.bounds[b], first, stop);
    const Rows padded = runs.elsewhere[b];
    copy_rows(from_row(runs.packed, runs.bounds[b] + first), from_row(padded, first), filled - first, runs.row_bytes,
              runs.store);
    zero_bytes(padded.at(filled), (stop - filled) * runs.row_bytes, runs.store);
    std::fill(mask + b * length + first, mask + b * length + filled, true);
    std::fill(mask + b * length + filled, mask + b * length + stop, false);
    row += stop - first;
  }
  finish_stores(runs.store);
}

template <typename Index>
bool in_range(const Index* rows, int64_t count, int64_t total) {
  bool outside = false;
  for (int64_t r = 0; r < count; ++r)
    outside |= static_cast<uint64_t>(int64_t{rows[r]}) >= static_cast<uint64_t>(total);
  return !outside;
}
template bool in_range(const int32_t*, int64_t, int64_t);
template bool in_range(const int64_t*, int64_t, int64_t);

template <typename Index>
void gather_rows(Rows packed, const Index* rows, Rows out, int64_t row_bytes, Store store, int64_t begin, int64_t end) {
  const int64_t ahead = std::clamp<int64_t>(kBytesAhead / std::max<int64_t>(row_bytes, 1), 1, kRowsAhead);
  for (int64_t r = begin; r < end; ++r) {
    if (r + ahead < end) prefetch(packed.at(rows[r + ahead]), row_bytes);
    copy_bytes(out.at(r), packed.at(rows[r]), row_bytes, store);
  }
  finish_stores(store);
}
template void gather_rows(Rows, const int32_t*, Rows, int64_t, Store, int64_t, int64_t);
template void gather_rows(Rows, const int64_t*, Rows, int64_t, Store, int64_t, int64_t);

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
                     Store store, int64_t begin, int64_t end) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t row_bytes = width * static_cast<int64_t>(sizeof(T));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = head[t];
      if (first < 0) {
        zero_bytes(out.at(t), row_bytes, store);
      } else if (next[first] < 0) {
        copy_bytes(out.at(t), grad.at(first), row_bytes, store);
      } else {
        sum_list<T>(grad, next, first, elements<T>(out, t), width);
      }
    }
  });
  finish_stores(store);
}

void segment_mean(Rows packed, const int32_t* bounds, Rows out, int64_t width, DType dtype, int64_t begin,
                  int64_t end) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t n = begin; n < end; ++n) mean_of<T>(packed, bounds[n], bounds[n + 1], elements<T>(out, n), width);
  });
}

void segment_mean_backward(Rows grad, const int32_t* bounds, Rows out, int64_t width, DType dtype, Store store,
                           int64_t begin, int64_t end) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t length = bounds[n + 1] - bounds[n];
      if (length <= 0) continue;
      T* first = elements<T>(out, bounds[n]);
      divide_strip<T>(elements<T>(grad, n), static_cast<Accumulator<T>>(length), first, width);
      for (int64_t t = bounds[n] + 1; t < bounds[n + 1]; ++t)
        copy_bytes(out.at(t), reinterpret_cast<const char*>(first), width * static_cast<int64_t>(sizeof(T)), store);
    }
  });
  finish_stores(store);
}

}  // namespace mm::cpu
