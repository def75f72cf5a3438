// torch.ops.mm_cpp.{pack, pack_out, unpack, ...}: allocates or takes outputs, and has them written.   Schemas:
// ops/packing/schemas.py
#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>
#include <vector>

#include "bindings/packing_tensors.h"
#include "bindings/packing_writes.h"

namespace {

using namespace mm::bindings;
using Tensors = std::vector<Tensor>;

std::vector<View> views_of(const Tensors& tensors) {
  std::vector<View> views;
  for (const Tensor& t : tensors) views.push_back(view_of(t));
  return views;
}

Segments segments_of(const Tensor& segments) {
  STD_TORCH_CHECK(segments.dim() == 2 && segments.size(1) == 4 && segments.is_contiguous() &&
                      segments.scalar_type() == ScalarType::Int,
                  "packing: segments must be contiguous int32 [N, 4]");
  check_memory("segments", segments);
  return {static_cast<const int32_t*>(segments.data_ptr()), segments.size(0)};
}

// The copies live as long as the call that reads them.  Outputs must lie apart from what was given, not from a copy.
Tensor whole_rows(const Tensor& given, const Tensor& out) {
  if (has_whole_rows(given)) return given;
  check_apart(given, out);
  return with_whole_rows(given);
}

Tensors whole_rows(const Tensors& given, const Tensor& out) {
  Tensors whole;
  for (const Tensor& t : given) whole.push_back(whole_rows(t, out));
  return whole;
}

// The operators: NAME allocates, NAME_out takes what it is given.  Per-token places are for the GPU: the table does
// here.

void pack_out(Tensors streams, Tensor segments, Tensor, Tensor, Tensor out) {
  const Tensors whole = whole_rows(streams, out);
  write_pack(views_of(whole), segments_of(segments), view_of(out), Output::kGiven);
}

Tensor pack(Tensors streams, Tensor segments, Tensor, Tensor, int64_t total) {
  STD_TORCH_CHECK(!streams.empty(), "packing: no streams");
  check_matrix(streams[0]);
  Tensor out = new_tensor(streams[0], std::array{total, streams[0].size(1)});
  const Tensors whole = whole_rows(streams, out);
  write_pack(views_of(whole), segments_of(segments), view_of(out), Output::kNew);
  return out;
}

void unpack_out(Tensor packed, Tensor segments, Tensor, Tensor, Tensors out) {
  for (const Tensor& stream : out) check_apart(packed, stream);
  const Tensor whole = with_whole_rows(packed);
  write_unpack(view_of(whole), segments_of(segments), views_of(out), Output::kGiven);
}

Tensors unpack(Tensor packed, Tensor segments, Tensor, Tensor, std::vector<int64_t> stream_lengths) {
  check_matrix(packed);
  Tensors streams;
  for (const int64_t length : stream_lengths) streams.push_back(new_tensor(packed, std::array{length, packed.size(1)}));
  const Tensor whole = with_whole_rows(packed);
  write_unpack(view_of(whole), segments_of(segments), views_of(streams), Output::kNew);
  return streams;
}

void pad_out(Tensor packed, Tensor bounds, Tensor out, Tensor mask) {
  check_apart(packed, mask);
  const Tensor whole = whole_rows(packed, out);
  write_pad(view_of(whole), view_of(bounds), view_of(out), view_of(mask), Output::kGiven);
}

std::tuple<Tensor, Tensor> pad(Tensor packed, Tensor bounds, int64_t length) {
  check_matrix(packed);
  const int64_t B = bounds.size(0) - 1;
  Tensor out = new_tensor(packed, std::array{B, length, packed.size(1)});
  Tensor mask = new_tensor(packed, std::array{B, length}, true);
  const Tensor whole = with_whole_rows(packed);
  write_pad(view_of(whole), view_of(bounds), view_of(out), view_of(mask), Output::kNew);
  return {out, mask};
}

void unpad_out(Tensor padded, Tensor bounds, Tensor out) {
  const Tensor whole = whole_rows(padded, out);
  write_unpad(view_of(whole), view_of(bounds), view_of(out), Output::kGiven);
}

Tensor unpad(Tensor padded, Tensor bounds, int64_t total) {
  STD_TORCH_CHECK(padded.dim() == 3, "packing: padded must be [B, L, E]");
  Tensor out = new_tensor(padded, std::array{total, padded.size(2)});
  const Tensor whole = with_whole_rows(padded);
  write_unpad(view_of(whole), view_of(bounds), view_of(out), Output::kNew);
  return out;
}

// For the operators that turn rows into `count` rows, told by a vector of rows or bounds.
template <auto write>
Tensor rows_to_rows(const Tensor& in, const Tensor& where, int64_t count) {
  check_matrix(in);
  Tensor out = new_tensor(in, std::array{count, in.size(1)});
  const Tensor whole = with_whole_rows(in), vector = made_contiguous(where);
  write(view_of(whole), view_of(vector), view_of(out), Output::kNew);
  return out;
}

template <auto write>
void rows_to_rows_out(const Tensor& in, const Tensor& where, const Tensor& out) {
  const Tensor whole = whole_rows(in, out), vector = made_contiguous(where);
  write(view_of(whole), view_of(vector), view_of(out), Output::kGiven);
}

Tensor gather_rows(Tensor packed, Tensor rows) { return rows_to_rows<write_gather_rows>(packed, rows, rows.size(0)); }
void gather_rows_out(Tensor packed, Tensor rows, Tensor out) { rows_to_rows_out<write_gather_rows>(packed, rows, out); }
Tensor scatter_rows_sum(Tensor grad, Tensor rows, int64_t total) {
  return rows_to_rows<write_scatter_rows_sum>(grad, rows, total);
}
void scatter_rows_sum_out(Tensor grad, Tensor rows, Tensor out) {
  rows_to_rows_out<write_scatter_rows_sum>(grad, rows, out);
}
Tensor segment_mean(Tensor packed, Tensor bounds) {
  return rows_to_rows<write_segment_mean>(packed, bounds, bounds.size(0) - 1);
}
void segment_mean_out(Tensor packed, Tensor bounds, Tensor out) {
  rows_to_rows_out<write_segment_mean>(packed, bounds, out);
}
Tensor segment_mean_backward(Tensor grad, Tensor bounds, int64_t total) {
  return rows_to_rows<write_segment_mean_backward>(grad, bounds, total);
}
void segment_mean_backward_out(Tensor grad, Tensor bounds, Tensor out) {
  rows_to_rows_out<write_segment_mean_backward>(grad, bounds, out);
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
