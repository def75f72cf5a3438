// torch.ops.mm_cpp.{pack, pack_out, unpack, ...}: check, allocate, split over threads.   Schemas:
// ops/packing/schemas.py
#include "cpu/packing.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "bindings/packing_tensors.h"

namespace {

using namespace mm::bindings;
using mm::cpu::DType;
using mm::cpu::Rows;
using mm::cpu::Runs;
using mm::cpu::Store;
using Tensors = std::vector<Tensor>;

constexpr int64_t kBytesPerTask = 1 << 17;  // below this another thread costs more than it copies
// Where an output comes from: new pages are in the cache already, since the system has just zeroed them.
enum class Output { kGiven, kNew };

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

// Runs with the arrays that they point to.
struct OwnedRuns {
  std::vector<int64_t> bounds{0};
  std::vector<Rows> elsewhere;

  void add(Rows rows, int64_t first, int64_t length) {
    elsewhere.push_back({rows.at(first), rows.stride});
    bounds.push_back(bounds.back() + length);
  }
  Runs with(const Tensor& packed, int64_t rows_written, Output output) const {
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
OwnedRuns runs_of_segments(const Tensor& segments, const Tensors& streams, const Tensor& packed) {
  STD_TORCH_CHECK(segments.dim() == 2 && segments.size(1) == 4 && segments.is_contiguous() &&
                      segments.scalar_type() == ScalarType::Int,
                  "packing: segments must be contiguous int32 [N, 4]");
  std::vector<Rows> rows;
  std::vector<int64_t> lengths;
  for (const Tensor& stream : streams) {
    check_alike(stream, packed);
    rows.push_back(rows_as<Rows>(stream));
    lengths.push_back(stream.size(0));
  }
  std::vector<int64_t> left = lengths;
  const auto* table = static_cast<const int32_t*>(segments.data_ptr());
  const int64_t count = segments.size(0);
  OwnedRuns runs;
  runs.bounds.reserve(count + 1);
  runs.elsewhere.reserve(count);
  for (int64_t n = 0; n < count; ++n, table += 4) {
    const int64_t modality = table[1], length = table[2], first = table[3];
    STD_TORCH_CHECK(modality >= 0 && modality < static_cast<int64_t>(rows.size()) && length >= 0 && first >= 0 &&
                        first + length <= lengths[modality],
                    "packing: segment ", n, " lies outside its stream");
    left[modality] -= length;
    runs.add(rows[modality], first, length);
  }
  STD_TORCH_CHECK(std::all_of(left.begin(), left.end(), [](int64_t rest) { return rest == 0; }),
                  "packing: segments and streams do not hold the same rows");
  STD_TORCH_CHECK(runs.bounds.back() == packed.size(0), "packing: segments hold ", runs.bounds.back(),
                  " tokens, expected ", packed.size(0));
  return runs;
}

// The copies live as long as the call that reads them.
Tensors with_whole_rows(const Tensors& tensors) {
  Tensors whole;
  for (const Tensor& t : tensors) whole.push_back(mm::bindings::with_whole_rows(t));
  return whole;
}

void write_pack(const Tensors& given, const Tensor& segments, const Tensor& out, Output output) {
  const Tensors streams = with_whole_rows(given);
  const OwnedRuns owned = runs_of_segments(segments, streams, out);
  const Runs runs = owned.with(out, out.size(0), output);
  split(out.size(0), runs.row_bytes, [&](int64_t begin, int64_t end) { mm::cpu::pack_rows(runs, begin, end); });
}

void write_unpack(const Tensor& given, const Tensor& segments, const Tensors& out, Output output) {
  const Tensor packed = mm::bindings::with_whole_rows(given);
  const OwnedRuns owned = runs_of_segments(segments, out, packed);
  const Runs runs = owned.with(packed, packed.size(0), output);
  split(packed.size(0), runs.row_bytes, [&](int64_t begin, int64_t end) { mm::cpu::unpack_rows(runs, begin, end); });
}

// The bounds of `total` rows, checked: int32 [N + 1], rising from 0 to total.
const int32_t* bounds_of(const Tensor& bounds, int64_t total) {
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
OwnedRuns runs_of_samples(const Tensor& bounds, const Tensor& padded, const Tensor& packed) {
  const int32_t* at = bounds_of(bounds, packed.size(0));
  STD_TORCH_CHECK(padded.dim() == 3 && padded.size(0) == bounds.size(0) - 1, "packing: padded must be [B, L, E]");
  check_alike(padded, packed);
  const Rows rows = rows_as<Rows>(padded);
  const int64_t sample_bytes = padded.stride(0) * static_cast<int64_t>(padded.element_size()), L = padded.size(1);
  OwnedRuns runs;
  for (int64_t b = 0; b < padded.size(0); ++b) {
    const int64_t length = at[b + 1] - at[b];
    STD_TORCH_CHECK(length <= L, "packing: sample ", b, " has ", length, " tokens, padded holds ", L);
    runs.add({rows.data + b * sample_bytes, rows.stride}, 0, length);
  }
  return runs;
}

void write_pad(const Tensor& given, const Tensor& bounds, const Tensor& out, const Tensor& mask, Output output) {
  const Tensor packed = mm::bindings::with_whole_rows(given);
  const OwnedRuns owned = runs_of_samples(bounds, out, packed);
  const int64_t rows = out.size(0) * out.size(1), length = out.size(1);
  const Runs runs = owned.with(packed, rows, output);
  auto* seen = static_cast<bool*>(mask.data_ptr());
  // + 1: the mask of rows that have no bytes is written all the same
  split(rows, runs.row_bytes + 1,
        [&](int64_t begin, int64_t end) { mm::cpu::pad_rows(runs, length, seen, begin, end); });
}

void write_unpad(const Tensor& given, const Tensor& bounds, const Tensor& out, Output output) {
  const Tensor padded = mm::bindings::with_whole_rows(given);
  const OwnedRuns owned = runs_of_samples(bounds, padded, out);
  const Runs runs = owned.with(out, out.size(0), output);
  split(out.size(0), runs.row_bytes, [&](int64_t begin, int64_t end) { mm::cpu::pack_rows(runs, begin, end); });
}

// body(pointer) with the rows as int32 or int64, all of them in [0, total).
template <typename Body>
void with_index(const Tensor& given, int64_t total, const Body& body) {
  STD_TORCH_CHECK(given.dim() == 1, "packing: rows must be [R]");
  const Tensor rows = given.is_contiguous() ? given : torch::stable::contiguous(given);
  const auto checked = [&](const auto* index) {
    STD_TORCH_CHECK(mm::cpu::in_range(index, rows.size(0), total), "packing: a row lies outside [0, ", total, ")");
    body(index);
  };
  if (rows.scalar_type() == ScalarType::Int) return checked(static_cast<const int32_t*>(rows.data_ptr()));
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long, "packing: rows must be int32 or int64");
  checked(static_cast<const int64_t*>(rows.data_ptr()));
}

void write_gather_rows(const Tensor& given, const Tensor& rows, const Tensor& out, Output output) {
  const Tensor packed = mm::bindings::with_whole_rows(given);
  const Rows from = rows_as<Rows>(packed), to = rows_as<Rows>(out);
  const int64_t count = out.size(0), row_bytes = row_bytes_of(packed);
  const Store store = store_for(count * row_bytes, output);
  with_index(rows, packed.size(0), [&](const auto* index) {
    split(count, row_bytes,
          [&](int64_t begin, int64_t end) { mm::cpu::gather_rows(from, index, to, row_bytes, store, begin, end); });
  });
}

void write_scatter_rows_sum(const Tensor& given, const Tensor& rows, const Tensor& out, Output output) {
  const Tensor grad = mm::bindings::with_whole_rows(given);
  const Rows from = rows_as<Rows>(grad), to = rows_as<Rows>(out);
  const DType dtype = sum_type_of<DType>(grad);
  const int64_t total = out.size(0), row_bytes = row_bytes_of(out);
  STD_TORCH_CHECK(grad.size(0) == rows.size(0), "packing: grad must have ", rows.size(0), " rows");
  const Store store = store_for(total * row_bytes, output);
  std::vector<int64_t> head(total), next(rows.size(0));
  with_index(rows, total,
             [&](const auto* index) { mm::cpu::list_sources(index, rows.size(0), total, head.data(), next.data()); });
  split(total, row_bytes, [&](int64_t begin, int64_t end) {
    mm::cpu::sum_listed_rows(from, head.data(), next.data(), to, grad.size(1), dtype, store, begin, end);
  });
}

// Runs body(first segment, last segment) on threads that share out the tokens: each segment belongs to the thread that
// has its first token, so sums do not depend on how many threads there are.
template <typename Body>
void split_segments(const Tensor& bounds, int64_t total, int64_t row_bytes, const Body& body) {
  const int32_t* first = bounds_of(bounds, total);
  const int32_t* last = first + bounds.size(0) - 1;
  // Position total stands for empty segments at the end.
  split(total + 1, row_bytes, [&](int64_t begin, int64_t end) {
    body(std::lower_bound(first, last, begin) - first, std::lower_bound(first, last, end) - first);
  });
}

void write_segment_mean(const Tensor& given, const Tensor& bounds, const Tensor& out, Output) {
  const Tensor packed = mm::bindings::with_whole_rows(given);
  const Rows from = rows_as<Rows>(packed), to = rows_as<Rows>(out);
  const DType dtype = sum_type_of<DType>(packed);
  const auto* at = static_cast<const int32_t*>(bounds.data_ptr());
  split_segments(bounds, packed.size(0), row_bytes_of(packed), [&](int64_t begin, int64_t end) {
    mm::cpu::segment_mean(from, at, to, packed.size(1), dtype, begin, end);
  });
}

void write_segment_mean_backward(const Tensor& given, const Tensor& bounds, const Tensor& out, Output output) {
  const Tensor grad = mm::bindings::with_whole_rows(given);
  const Rows from = rows_as<Rows>(grad), to = rows_as<Rows>(out);
  const DType dtype = sum_type_of<DType>(grad);
  STD_TORCH_CHECK(grad.size(0) == bounds.size(0) - 1, "packing: grad must have a row per segment");
  const auto* at = static_cast<const int32_t*>(bounds.data_ptr());
  const int64_t total = out.size(0), row_bytes = row_bytes_of(out);
  const Store store = store_for(total * row_bytes, output);
  split_segments(bounds, total, row_bytes, [&](int64_t begin, int64_t end) {
    mm::cpu::segment_mean_backward(from, at, to, grad.size(1), dtype, store, begin, end);
  });
}

// The operators: NAME allocates, NAME_out checks what it is given.  Per-token places are for the GPU: the table does
// here.

void pack_out(Tensors streams, Tensor segments, Tensor, Tensor, Tensor out) {
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous(), "packing: out must be contiguous [T, E]");
  for (const Tensor& stream : streams) {
    check_matrix(stream);
    check_apart(stream, out);
  }
  write_pack(streams, segments, out, Output::kGiven);
}

Tensor pack(Tensors streams, Tensor segments, Tensor, Tensor, int64_t total) {
  STD_TORCH_CHECK(!streams.empty(), "packing: no streams");
  for (const Tensor& stream : streams) check_matrix(stream);
  Tensor out = new_tensor(streams[0], std::array{total, streams[0].size(1)});
  write_pack(streams, segments, out, Output::kNew);
  return out;
}

void unpack_out(Tensor packed, Tensor segments, Tensor, Tensor, Tensors out) {
  check_matrix(packed);
  check_outputs(packed, out);
  write_unpack(packed, segments, out, Output::kGiven);
}

Tensors unpack(Tensor packed, Tensor segments, Tensor, Tensor, std::vector<int64_t> stream_lengths) {
  check_matrix(packed);
  Tensors streams;
  for (const int64_t length : stream_lengths) streams.push_back(new_tensor(packed, std::array{length, packed.size(1)}));
  write_unpack(packed, segments, streams, Output::kNew);
  return streams;
}

void pad_out(Tensor packed, Tensor bounds, Tensor out, Tensor mask) {
  check_matrix(packed);
  check_padded(packed, out, mask);
  write_pad(packed, bounds, out, mask, Output::kGiven);
}

std::tuple<Tensor, Tensor> pad(Tensor packed, Tensor bounds, int64_t length) {
  check_matrix(packed);
  const int64_t B = bounds.size(0) - 1;
  Tensor out = new_tensor(packed, std::array{B, length, packed.size(1)});
  Tensor mask = new_tensor(packed, std::array{B, length}, true);
  write_pad(packed, bounds, out, mask, Output::kNew);
  return {out, mask};
}

void unpad_out(Tensor padded, Tensor bounds, Tensor out) {
  check_shape(out, out.size(0), padded);
  check_apart(padded, out);
  write_unpad(padded, bounds, out, Output::kGiven);
}

Tensor unpad(Tensor padded, Tensor bounds, int64_t total) {
  STD_TORCH_CHECK(padded.dim() == 3, "packing: padded must be [B, L, E]");
  Tensor out = new_tensor(padded, std::array{total, padded.size(2)});
  write_unpad(padded, bounds, out, Output::kNew);
  return out;
}

// For the operators that turn rows into `count` rows.
template <auto write>
Tensor rows_to_rows(const Tensor& in, const Tensor& where, int64_t count) {
  check_matrix(in);
  Tensor out = new_tensor(in, std::array{count, in.size(1)});
  write(in, where, out, Output::kNew);
  return out;
}

template <auto write>
void rows_to_rows_out(const Tensor& in, const Tensor& where, const Tensor& out, int64_t count) {
  check_matrix(in);
  check_shape(out, count, in);
  check_apart(in, out);
  write(in, where, out, Output::kGiven);
}

Tensor gather_rows(Tensor packed, Tensor rows) { return rows_to_rows<write_gather_rows>(packed, rows, rows.size(0)); }
void gather_rows_out(Tensor packed, Tensor rows, Tensor out) {
  rows_to_rows_out<write_gather_rows>(packed, rows, out, rows.size(0));
}
Tensor scatter_rows_sum(Tensor grad, Tensor rows, int64_t total) {
  return rows_to_rows<write_scatter_rows_sum>(grad, rows, total);
}
void scatter_rows_sum_out(Tensor grad, Tensor rows, Tensor out) {
  rows_to_rows_out<write_scatter_rows_sum>(grad, rows, out, out.size(0));
}
Tensor segment_mean(Tensor packed, Tensor bounds) {
  return rows_to_rows<write_segment_mean>(packed, bounds, bounds.size(0) - 1);
}
void segment_mean_out(Tensor packed, Tensor bounds, Tensor out) {
  rows_to_rows_out<write_segment_mean>(packed, bounds, out, bounds.size(0) - 1);
}
Tensor segment_mean_backward(Tensor grad, Tensor bounds, int64_t total) {
  return rows_to_rows<write_segment_mean_backward>(grad, bounds, total);
}
void segment_mean_backward_out(Tensor grad, Tensor bounds, Tensor out) {
  rows_to_rows_out<write_segment_mean_backward>(grad, bounds, out, out.size(0));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mm_cpp, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("pack_out", TORCH_BOX(&pack_out));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("unpack_out", TORCH_BOX(&unpack_out));
  m.impl("pad", TORCH_BOX(&pad));
  m.impl("pad_out", TORCH_BOX(&pad_out));
  m.impl("unpad", TORCH_BOX(&unpad));
  m.impl("unpad_out", TORCH_BOX(&unpad_out));
  m.impl("gather_rows", TORCH_BOX(&gather_rows));
  m.impl("gather_rows_out", TORCH_BOX(&gather_rows_out));
  m.impl("scatter_rows_sum", TORCH_BOX(&scatter_rows_sum));
  m.impl("scatter_rows_sum_out", TORCH_BOX(&scatter_rows_sum_out));
  m.impl("segment_mean", TORCH_BOX(&segment_mean));
  m.impl("segment_mean_out", TORCH_BOX(&segment_mean_out));
  m.impl("segment_mean_backward", TORCH_BOX(&segment_mean_backward));
  m.impl("segment_mean_backward_out", TORCH_BOX(&segment_mean_backward_out));
}
