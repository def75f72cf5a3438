// See packing_writes.h.
#include "bindings/packing_writes.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstddef>
#include <memory_resource>
#include <vector>

#include "bindings/packing_tensors.h"
#include "cpu/packing.h"

namespace mm::bindings {
namespace {

using mm::cpu::DType;
using mm::cpu::Rows;
using mm::cpu::Runs;
using mm::cpu::Store;

constexpr int64_t kBytesPerTask = 1 << 17;  // below this another thread costs more than it copies

Store store_for(int64_t bytes, Output output) {
  return output == Output::kNew ? Store::kCached : mm::cpu::store_for(bytes);
}

// One parallel region over `count` items of `item_bytes` each.
template <typename Body>
void split(int64_t count, int64_t item_bytes, const Body& body) {
  if (count == 0 || item_bytes == 0) return;
  const int64_t grain = std::max<int64_t>(1, kBytesPerTask / item_bytes);
  if (count <= grain) return body(0, count);
  torch::stable::parallel_for(0, count, grain, body);
}

void check_rows(const View& t) {
  STD_TORCH_CHECK(has_whole_rows(t), "packing: elements of a row must lie side by side");
}

// Memory of a call: on the stack as far as it reaches.
class Scratch {
 public:
  std::pmr::memory_resource* get() { return &pool_; }

 private:
  std::byte first_[4096];
  std::pmr::monotonic_buffer_resource pool_{first_, sizeof(first_)};
};

// Runs with the arrays that they point to.
struct OwnedRuns {
  std::pmr::vector<int64_t> bounds;
  std::pmr::vector<Rows> elsewhere;

  OwnedRuns(int64_t count, Scratch& scratch) : bounds(scratch.get()), elsewhere(scratch.get()) {
    bounds.reserve(count + 1);
    elsewhere.reserve(count);
    bounds.push_back(0);
  }
  void add(Rows rows, int64_t first, int64_t length) {
    elsewhere.push_back({rows.at(first), rows.stride});
    bounds.push_back(bounds.back() + length);
  }
  Runs with(const View& packed, int64_t rows_written, Output output) const {
    const int64_t row_bytes = row_bytes_of(packed);
    return {.bounds = bounds.data(),
            .elsewhere = elsewhere.data(),
            .count = static_cast<int64_t>(elsewhere.size()),
            .packed = rows_as<Rows>(packed),
            .row_bytes = row_bytes,
            .store = store_for(rows_written * row_bytes, output)};
  }
};

// One run per segment; also proves that the table stays inside the tensors, and that every row is in it.
OwnedRuns runs_of_segments(Segments segments, Views streams, const View& packed, Scratch& scratch) {
  struct Stream {
    Rows rows;
    int64_t length, left;
  };
  std::pmr::vector<Stream> of(scratch.get());
  of.reserve(streams.size());
  for (const View& stream : streams) {
    check_alike(stream, packed);
    of.push_back({rows_as<Rows>(stream), stream.size(0), stream.size(0)});
  }
  OwnedRuns runs(segments.count, scratch);
  const int32_t* row = segments.table;
  for (int64_t n = 0; n < segments.count; ++n, row += 4) {
    const int64_t modality = row[1], length = row[2], first = row[3];
    STD_TORCH_CHECK(modality >= 0 && modality < static_cast<int64_t>(of.size()) && length >= 0 && first >= 0 &&
                        first + length <= of[modality].length,
                    "packing: segment ", n, " lies outside its stream");
    of[modality].left -= length;
    runs.add(of[modality].rows, first, length);
  }
  STD_TORCH_CHECK(std::all_of(of.begin(), of.end(), [](const Stream& stream) { return stream.left == 0; }),
                  "packing: segments and streams do not hold the same rows");
  STD_TORCH_CHECK(runs.bounds.back() == packed.size(0), "packing: segments hold ", runs.bounds.back(),
                  " tokens, expected ", packed.size(0));
  return runs;
}

// The bounds of `total` rows, checked: int32 [N + 1], rising from 0 to total.
const int32_t* bounds_of(const View& bounds, int64_t total) {
  STD_TORCH_CHECK(
      bounds.dim() == 1 && bounds.size(0) >= 1 && bounds.is_contiguous() && bounds.scalar_type() == ScalarType::Int,
      "packing: bounds must be contiguous int32 [N + 1]");
  const auto* first = static_cast<const int32_t*>(bounds.data_ptr());
  const auto* last = first + bounds.size(0) - 1;
  STD_TORCH_CHECK(*first == 0 && *last == total && std::is_sorted(first, last + 1),
                  "packing: bounds must rise from 0 to ", total);
  return first;
}

// One run per sample of padded [B, L, E].
OwnedRuns runs_of_samples(const View& bounds, const View& padded, const View& packed, Scratch& scratch) {
  const int32_t* at = bounds_of(bounds, packed.size(0));
  STD_TORCH_CHECK(padded.dim() == 3 && padded.size(0) == bounds.size(0) - 1, "packing: padded must be [B, L, E]");
  check_alike(padded, packed);
  const Rows rows = rows_as<Rows>(padded);
  const int64_t sample_bytes = padded.stride(0) * static_cast<int64_t>(padded.element_size()), L = padded.size(1);
  OwnedRuns runs(padded.size(0), scratch);
  for (int64_t b = 0; b < padded.size(0); ++b) {
    const int64_t length = at[b + 1] - at[b];
    STD_TORCH_CHECK(length <= L, "packing: sample ", b, " has ", length, " tokens, padded holds ", L);
    runs.add({rows.data + b * sample_bytes, rows.stride}, 0, length);
  }
  return runs;
}

// Of the operators that turn rows into `count` rows.
void check_in_and_out(const View& in, const View& out, int64_t count, Output output) {
  check_matrix(in);
  check_rows(in);
  check_shape(out, count, in);
  if (output == Output::kGiven) check_apart(in, out);
}

// body(pointer) with the rows as int32 or int64, all of them in [0, total).
template <typename Body>
void with_index(const View& rows, int64_t total, const Body& body) {
  STD_TORCH_CHECK(rows.dim() == 1 && rows.is_contiguous(), "packing: rows must be contiguous [R]");
  const auto checked = [&](const auto* index) {
    STD_TORCH_CHECK(mm::cpu::in_range(index, rows.size(0), total), "packing: a row lies outside [0, ", total, ")");
    body(index);
  };
  if (rows.scalar_type() == ScalarType::Int) return checked(static_cast<const int32_t*>(rows.data_ptr()));
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long, "packing: rows must be int32 or int64");
  checked(static_cast<const int64_t*>(rows.data_ptr()));
}

// Runs body(first segment, last segment) on threads that share out the tokens: each segment belongs to the thread that
// has its first token, so sums do not depend on how many threads there are.
template <typename Body>
void split_segments(const View& bounds, int64_t total, int64_t row_bytes, const Body& body) {
  const int32_t* first = bounds_of(bounds, total);
  const int32_t* last = first + bounds.size(0) - 1;
  // Position total stands for empty segments at the end.
  split(total + 1, row_bytes, [&](int64_t begin, int64_t end) {
    body(std::lower_bound(first, last, begin) - first, std::lower_bound(first, last, end) - first);
  });
}

}  // namespace

void write_pack(Views streams, Segments segments, const View& out, Output output) {
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous(), "packing: out must be contiguous [T, E]");
  for (const View& stream : streams) {
    check_matrix(stream);
    check_rows(stream);
    if (output == Output::kGiven) check_apart(stream, out);
  }
  Scratch scratch;
  const OwnedRuns owned = runs_of_segments(segments, streams, out, scratch);
  const Runs runs = owned.with(out, out.size(0), output);
  split(out.size(0), runs.row_bytes, [&](int64_t begin, int64_t end) { mm::cpu::pack_rows(runs, begin, end); });
}

void write_unpack(const View& packed, Segments segments, Views out, Output output) {
  check_matrix(packed);
  check_rows(packed);
  if (output == Output::kGiven) check_outputs(packed, out);
  Scratch scratch;
  const OwnedRuns owned = runs_of_segments(segments, out, packed, scratch);
  const Runs runs = owned.with(packed, packed.size(0), output);
  split(packed.size(0), runs.row_bytes, [&](int64_t begin, int64_t end) { mm::cpu::unpack_rows(runs, begin, end); });
}

void write_pad(const View& packed, const View& bounds, const View& out, const View& mask, Output output) {
  check_matrix(packed);
  check_rows(packed);
  if (output == Output::kGiven) check_padded(packed, out, mask);
  Scratch scratch;
  const OwnedRuns owned = runs_of_samples(bounds, out, packed, scratch);
  const int64_t rows = out.size(0) * out.size(1), length = out.size(1);
  const Runs runs = owned.with(packed, rows, output);
  auto* seen = static_cast<bool*>(mask.data_ptr());
  // + 1: the mask of rows that have no bytes is written all the same
  split(rows, runs.row_bytes + 1,
        [&](int64_t begin, int64_t end) { mm::cpu::pad_rows(runs, length, seen, begin, end); });
}

void write_unpad(const View& padded, const View& bounds, const View& out, Output output) {
  STD_TORCH_CHECK(padded.dim() == 3, "packing: padded must be [B, L, E]");
  check_rows(padded);
  check_shape(out, out.size(0), padded);
  if (output == Output::kGiven) check_apart(padded, out);
  Scratch scratch;
  const OwnedRuns owned = runs_of_samples(bounds, padded, out, scratch);
  const Runs runs = owned.with(out, out.size(0), output);
  split(out.size(0), runs.row_bytes, [&](int64_t begin, int64_t end) { mm::cpu::pack_rows(runs, begin, end); });
}

void write_gather_rows(const View& packed, const View& rows, const View& out, Output output) {
  STD_TORCH_CHECK(rows.dim() == 1, "packing: rows must be [R]");
  check_in_and_out(packed, out, rows.size(0), output);
  if (output == Output::kGiven) check_apart(rows, out);  // they are read while the output is written
  const Rows from = rows_as<Rows>(packed), to = rows_as<Rows>(out);
  const int64_t count = out.size(0), row_bytes = row_bytes_of(packed);
  const Store store = store_for(count * row_bytes, output);
  with_index(rows, packed.size(0), [&](const auto* index) {
    split(count, row_bytes,
          [&](int64_t begin, int64_t end) { mm::cpu::gather_rows(from, index, to, row_bytes, store, begin, end); });
  });
}

void write_scatter_rows_sum(const View& grad, const View& rows, const View& out, Output output) {
  check_in_and_out(grad, out, out.size(0), output);
  const Rows from = rows_as<Rows>(grad), to = rows_as<Rows>(out);
  const DType dtype = sum_type_of<DType>(grad);
  const int64_t total = out.size(0), row_bytes = row_bytes_of(out);
  STD_TORCH_CHECK(rows.dim() == 1 && grad.size(0) == rows.size(0), "packing: grad must have a row per index");
  const Store store = store_for(total * row_bytes, output);
  std::vector<int64_t> head(total), next(rows.size(0));
  with_index(rows, total,
             [&](const auto* index) { mm::cpu::list_sources(index, rows.size(0), total, head.data(), next.data()); });
  split(total, row_bytes, [&](int64_t begin, int64_t end) {
    mm::cpu::sum_listed_rows(from, head.data(), next.data(), to, grad.size(1), dtype, store, begin, end);
  });
}

void write_segment_mean(const View& packed, const View& bounds, const View& out, Output output) {
  STD_TORCH_CHECK(bounds.dim() == 1, "packing: bounds must be [N + 1]");
  check_in_and_out(packed, out, bounds.size(0) - 1, output);
  const Rows from = rows_as<Rows>(packed), to = rows_as<Rows>(out);
  const DType dtype = sum_type_of<DType>(packed);
  const auto* at = static_cast<const int32_t*>(bounds.data_ptr());
  split_segments(bounds, packed.size(0), row_bytes_of(packed), [&](int64_t begin, int64_t end) {
    mm::cpu::segment_mean(from, at, to, packed.size(1), dtype, begin, end);
  });
}

void write_segment_mean_backward(const View& grad, const View& bounds, const View& out, Output output) {
  check_in_and_out(grad, out, out.size(0), output);
  const Rows from = rows_as<Rows>(grad), to = rows_as<Rows>(out);
  const DType dtype = sum_type_of<DType>(grad);
  STD_TORCH_CHECK(bounds.dim() == 1 && grad.size(0) == bounds.size(0) - 1, "packing: grad must have a row per segment");
  const auto* at = static_cast<const int32_t*>(bounds.data_ptr());
  const int64_t total = out.size(0), row_bytes = row_bytes_of(out);
  const Store store = store_for(total * row_bytes, output);
  split_segments(bounds, total, row_bytes, [&](int64_t begin, int64_t end) {
    mm::cpu::segment_mean_backward(from, at, to, grad.size(1), dtype, store, begin, end);
  });
}

}  // namespace mm::bindings
