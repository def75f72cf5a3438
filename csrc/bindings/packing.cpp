// torch.ops.mm_cpp.{pack, unpack, gather_rows, ...}: check, allocate, split over threads. Schemas:
// ops/packing/cpp_impl.py
#include "cpu/packing.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

namespace {

using mm::cpu::DType;
using mm::cpu::MoveRows;
using mm::cpu::Rows;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBytesPerTask = 1 << 18;  // below this a thread costs more than it copies

int64_t row_bytes_of(const Tensor& t) { return t.size(1) * static_cast<int64_t>(t.element_size()); }

Rows rows_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2 && (t.numel() == 0 || t.size(1) == 1 || t.stride(1) == 1),
                  "packing: rows must be contiguous inside");
  return {static_cast<char*>(t.data_ptr()), t.stride(0) * static_cast<int64_t>(t.element_size())};
}

DType sum_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, "packing: sums take fp32, bf16, fp16 and fp64");
  }
}

// One parallel region over `count` items of `item_bytes` each.
template <typename Body>
void split(int64_t count, int64_t item_bytes, const Body& body) {
  if (count == 0 || item_bytes == 0) return;
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kBytesPerTask / item_bytes), body);
}

// Where each segment's tokens begin; also proves that the table stays inside the tensors.
std::vector<int64_t> segment_bounds(const Tensor& segments, const std::vector<Tensor>& streams, int64_t total) {
  STD_TORCH_CHECK(segments.dim() == 2 && segments.size(1) == 4 && segments.is_contiguous() &&
                      segments.scalar_type() == ScalarType::Int,
                  "packing: segments must be contiguous int32 [N, 4]");
  const auto* table = static_cast<const int32_t*>(segments.data_ptr());
  std::vector<int64_t> bounds{0};
  bounds.reserve(segments.size(0) + 1);
  for (int64_t n = 0; n < segments.size(0); ++n, table += 4) {
    const int64_t modality = table[1], length = table[2], first = table[3];
    STD_TORCH_CHECK(modality >= 0 && modality < static_cast<int64_t>(streams.size()) && length >= 0 && first >= 0 &&
                        first + length <= streams[modality].size(0),
                    "packing: segment ", n, " lies outside its stream");
    bounds.push_back(bounds.back() + length);
  }
  STD_TORCH_CHECK(bounds.back() == total, "packing: segments hold ", bounds.back(), " tokens, expected ", total);
  return bounds;
}

void move_rows(decltype(mm::cpu::pack_rows)& mover, const Tensor& segments, const std::vector<Tensor>& streams,
               const Tensor& packed) {
  const std::vector<int64_t> bounds = segment_bounds(segments, streams, packed.size(0));
  std::vector<Rows> rows;
  for (const Tensor& stream : streams) {
    STD_TORCH_CHECK(stream.size(1) == packed.size(1) && stream.scalar_type() == packed.scalar_type(),
                    "packing: streams and packed rows must have one width and dtype");
    rows.push_back(rows_of(stream));
  }
  const MoveRows move{.segments = static_cast<const int32_t*>(segments.data_ptr()),
                      .bounds = bounds.data(),
                      .streams = rows.data(),
                      .packed = rows_of(packed),
                      .num_segments = segments.size(0),
                      .row_bytes = row_bytes_of(packed)};
  split(packed.size(0), move.row_bytes, [&](int64_t begin, int64_t end) { mover(move, begin, end); });
}

void pack_out(std::vector<Tensor> streams, Tensor segments, Tensor out) {
  move_rows(mm::cpu::pack_rows, segments, streams, out);
}

Tensor pack(std::vector<Tensor> streams, Tensor segments, int64_t total) {
  STD_TORCH_CHECK(!streams.empty(), "packing: no streams");
  Tensor out = torch::stable::new_empty(streams[0], {total, streams[0].size(1)});
  move_rows(mm::cpu::pack_rows, segments, streams, out);
  return out;
}

std::vector<Tensor> unpack(Tensor packed, Tensor segments, std::vector<int64_t> stream_lengths) {
  std::vector<Tensor> streams;
  for (const int64_t length : stream_lengths)
    streams.push_back(torch::stable::new_empty(packed, {length, packed.size(1)}));
  move_rows(mm::cpu::unpack_rows, segments, streams, packed);
  return streams;
}

// body(pointer) with the rows as int32 or int64.
template <typename Body>
void with_index(const Tensor& rows, const Body& body) {
  STD_TORCH_CHECK(rows.dim() == 1 && rows.is_contiguous(), "packing: rows must be contiguous [R]");
  if (rows.scalar_type() == ScalarType::Int) return body(static_cast<const int32_t*>(rows.data_ptr()));
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long, "packing: rows must be int32 or int64");
  body(static_cast<const int64_t*>(rows.data_ptr()));
}

Tensor gather_rows(Tensor packed, Tensor rows) {
  Tensor out = torch::stable::new_empty(packed, {rows.size(0), packed.size(1)});
  const Rows from = rows_of(packed), to = rows_of(out);
  const int64_t row_bytes = row_bytes_of(packed);
  with_index(rows, [&](const auto* index) {
    split(rows.size(0), row_bytes,
          [&](int64_t begin, int64_t end) { mm::cpu::gather_rows(from, index, to, row_bytes, begin, end); });
  });
  return out;
}

Tensor scatter_rows_sum(Tensor grad, Tensor rows, int64_t total) {
  Tensor out = torch::stable::new_empty(grad, {total, grad.size(1)});
  const Rows from = rows_of(grad), to = rows_of(out);
  const DType dtype = sum_type(grad);
  std::vector<int64_t> head(total), next(rows.size(0));
  with_index(rows,
             [&](const auto* index) { mm::cpu::list_sources(index, rows.size(0), total, head.data(), next.data()); });
  split(total, row_bytes_of(grad), [&](int64_t begin, int64_t end) {
    mm::cpu::sum_listed_rows(from, head.data(), next.data(), to, grad.size(1), dtype, begin, end);
  });
  return out;
}

// Runs body(first segment, last segment) on threads that share out the tokens: each segment belongs to the thread that
// has its first token, so sums do not depend on how many threads there are.
template <typename Body>
void split_segments(const Tensor& bounds, int64_t total, int64_t row_bytes, const Body& body) {
  STD_TORCH_CHECK(
      bounds.dim() == 1 && bounds.size(0) >= 1 && bounds.is_contiguous() && bounds.scalar_type() == ScalarType::Int,
      "packing: bounds must be contiguous int32 [N + 1]");
  const auto* first = static_cast<const int32_t*>(bounds.data_ptr());
  const auto* last = first + bounds.size(0) - 1;
  STD_TORCH_CHECK(*first == 0 && *last == total && std::is_sorted(first, last + 1),
                  "packing: bounds must rise from 0 to ", total);
  // Position total stands for empty segments at the end.
  split(total + 1, row_bytes, [&](int64_t begin, int64_t end) {
    body(std::lower_bound(first, last, begin) - first, std::lower_bound(first, last, end) - first);
  });
}

Tensor segment_mean(Tensor packed, Tensor bounds) {
  Tensor out = torch::stable::new_empty(packed, {bounds.size(0) - 1, packed.size(1)});
  const Rows from = rows_of(packed), to = rows_of(out);
  const DType dtype = sum_type(packed);
  const auto* at = static_cast<const int32_t*>(bounds.data_ptr());
  split_segments(bounds, packed.size(0), row_bytes_of(packed), [&](int64_t begin, int64_t end) {
    mm::cpu::segment_mean(from, at, to, packed.size(1), dtype, begin, end);
  });
  return out;
}

Tensor segment_mean_backward(Tensor grad, Tensor bounds, int64_t total) {
  Tensor out = torch::stable::new_empty(grad, {total, grad.size(1)});
  const Rows from = rows_of(grad), to = rows_of(out);
  const DType dtype = sum_type(grad);
  const auto* at = static_cast<const int32_t*>(bounds.data_ptr());
  split_segments(bounds, total, row_bytes_of(grad), [&](int64_t begin, int64_t end) {
    mm::cpu::segment_mean_backward(from, at, to, grad.size(1), dtype, begin, end);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mm_cpp, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("pack_out", TORCH_BOX(&pack_out));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("gather_rows", TORCH_BOX(&gather_rows));
  m.impl("scatter_rows_sum", TORCH_BOX(&scatter_rows_sum));
  m.impl("segment_mean", TORCH_BOX(&segment_mean));
  m.impl("segment_mean_backward", TORCH_BOX(&segment_mean_backward));
}
