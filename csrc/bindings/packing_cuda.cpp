// torch.ops.mm_cuda.{pack, pack_out, ...}: check, guard the device, allocate, launch on the current stream.   Schemas:
// ops/packing/schemas.py and cuda_impl.py.   Nothing here reads device memory or waits.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>
#include <vector>

#include "bindings/packing_tensors.h"
#include "kernels/packing.h"

namespace {

using namespace mm::bindings;
using mm::cuda::DType;
using mm::cuda::Rows;
using Tensors = std::vector<Tensor>;

// Makes the tensor's device current, and runs launch(stream) there.
template <class Launch>
void on_device_of(const Tensor& t, const char* name, const Launch& launch) {
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  void* stream = nullptr;
  check_call(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  const cudaError_t error = launch(static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == cudaSuccess, "packing: ", name, " did not launch: ", cudaGetErrorString(error));
}

// A contiguous vector of `count` elements (any number where it is -1) on the device of `like`.
template <class T>
const T* vector_of(const Tensor& t, ScalarType type, int64_t count, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 1 && t.is_contiguous() && t.scalar_type() == type && (count < 0 || t.size(0) == count),
                  "packing: expected a contiguous vector of ", count, " elements");
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(),
                  "packing: tensors must lie on one GPU");
  return static_cast<const T*>(t.data_ptr());
}

Tensors with_whole_rows(const Tensors& tensors) {
  Tensors whole;
  for (const Tensor& t : tensors) whole.push_back(mm::bindings::with_whole_rows(t));
  return whole;
}

mm::cuda::StreamMove stream_move(const Tensor& packed, const Tensors& streams, const Tensor& modality_ids,
                                 const Tensor& source_rows) {
  STD_TORCH_CHECK(streams.size() <= mm::cuda::kMaxStreams, "packing: at most ", mm::cuda::kMaxStreams, " streams");
  mm::cuda::StreamMove move{};
  move.packed = rows_as<Rows>(packed);
  move.num_streams = static_cast<int>(streams.size());
  int64_t rows = 0;
  for (size_t m = 0; m < streams.size(); ++m) {
    check_alike(streams[m], packed);
    STD_TORCH_CHECK(streams[m].is_cuda() && streams[m].get_device_index() == packed.get_device_index(),
                    "packing: tensors must lie on one GPU");
    move.streams[m] = rows_as<Rows>(streams[m]);
    rows += streams[m].size(0);
  }
  move.total = packed.size(0);
  STD_TORCH_CHECK(rows == move.total, "packing: streams hold ", rows, " rows, packed ", move.total);
  move.modality_ids = vector_of<uint8_t>(modality_ids, ScalarType::Byte, move.total, packed);
  move.source_rows = vector_of<int32_t>(source_rows, ScalarType::Int, move.total, packed);
  move.row_bytes = row_bytes_of(packed);
  return move;
}

void write_pack(const Tensors& given, const Tensor& modality_ids, const Tensor& source_rows, const Tensor& out) {
  const Tensors streams = with_whole_rows(given);
  const auto move = stream_move(out, streams, modality_ids, source_rows);
  on_device_of(out, "pack", [&](cudaStream_t stream) { return mm::cuda::pack_rows(move, stream); });
}

void write_unpack(const Tensor& given, const Tensor& modality_ids, const Tensor& source_rows, const Tensors& out) {
  const Tensor packed = mm::bindings::with_whole_rows(given);
  const auto move = stream_move(packed, out, modality_ids, source_rows);
  on_device_of(packed, "unpack", [&](cudaStream_t stream) { return mm::cuda::unpack_rows(move, stream); });
}

mm::cuda::PaddedMove padded_move(const Tensor& packed, const Tensor& padded, const Tensor& bounds, bool* mask) {
  STD_TORCH_CHECK(padded.dim() == 3 && packed.dim() == 2, "packing: expected [B, L, E] and [T, E]");
  check_alike(packed, padded);
  return {.packed = rows_as<Rows>(packed),
          .padded = rows_as<Rows>(padded),
          .sample_stride = padded.stride(0) * static_cast<int64_t>(padded.element_size()),
          .bounds = vector_of<int32_t>(bounds, ScalarType::Int, padded.size(0) + 1, packed),
          .mask = mask,
          .samples = padded.size(0),
          .length = padded.size(1),
          .total = packed.size(0),
          .row_bytes = row_bytes_of(packed)};
}

void write_pad(const Tensor& given, const Tensor& bounds, const Tensor& out, const Tensor& mask) {
  const Tensor packed = mm::bindings::with_whole_rows(given);
  const auto move = padded_move(packed, out, bounds, static_cast<bool*>(mask.data_ptr()));
  on_device_of(out, "pad", [&](cudaStream_t stream) { return mm::cuda::pad_rows(move, stream); });
}

void write_unpad(const Tensor& given, const Tensor& bounds, const Tensor& out) {
  const Tensor padded = mm::bindings::with_whole_rows(given);
  const auto move = padded_move(out, padded, bounds, nullptr);
  on_device_of(out, "unpad", [&](cudaStream_t stream) { return mm::cuda::unpad_rows(move, stream); });
}

// Where rows are told apart by int32 or int64 numbers: (pointer, whether they are int64).
std::pair<const void*, bool> index_of(const Tensor& rows, int64_t count, const Tensor& like) {
  if (rows.scalar_type() == ScalarType::Long) return {vector_of<int64_t>(rows, ScalarType::Long, count, like), true};
  return {vector_of<int32_t>(rows, ScalarType::Int, count, like), false};
}

void write_gather_rows(const Tensor& given, const Tensor& given_rows, const Tensor& out) {
  const Tensor packed = mm::bindings::with_whole_rows(given);
  const Tensor rows = made_contiguous(given_rows);
  const auto [index, wide] = index_of(rows, out.size(0), packed);
  const mm::cuda::Gather gather{rows_as<Rows>(packed), rows_as<Rows>(out),  index, wide,
                                out.size(0),           row_bytes_of(packed)};
  on_device_of(out, "gather_rows", [&](cudaStream_t stream) { return mm::cuda::gather_rows(gather, stream); });
}

void write_sum_sorted_rows(const Tensor& given, const Tensor& sorted, const Tensor& order, const Tensor& out) {
  const Tensor grad = mm::bindings::with_whole_rows(given);
  const int64_t count = grad.size(0);
  const auto [index, wide] = index_of(sorted, count, grad);
  const mm::cuda::SortedSum sum{.grad = rows_as<Rows>(grad),
                                .out = rows_as<Rows>(out),
                                .sorted = index,
                                .order = vector_of<int64_t>(order, ScalarType::Long, count, grad),
                                .wide = wide,
                                .dtype = sum_type_of<DType>(grad),
                                .count = count,
                                .total = out.size(0),
                                .width = grad.size(1)};
  on_device_of(out, "scatter_rows_sum", [&](cudaStream_t stream) { return mm::cuda::sum_sorted_rows(sum, stream); });
}

mm::cuda::SegmentMean means_of(const Tensor& packed, const Tensor& means, const Tensor& bounds) {
  return {.packed = rows_as<Rows>(packed),
          .means = rows_as<Rows>(means),
          .bounds = vector_of<int32_t>(bounds, ScalarType::Int, means.size(0) + 1, packed),
          .dtype = sum_type_of<DType>(packed),
          .segments = means.size(0),
          .total = packed.size(0),
          .width = packed.size(1)};
}

void write_segment_mean(const Tensor& given, const Tensor& bounds, const Tensor& out) {
  const Tensor packed = mm::bindings::with_whole_rows(given);
  const auto mean = means_of(packed, out, bounds);
  on_device_of(out, "segment_mean", [&](cudaStream_t stream) { return mm::cuda::segment_mean(mean, stream); });
}

void write_segment_mean_backward(const Tensor& given, const Tensor& bounds, const Tensor& out) {
  const Tensor grad = mm::bindings::with_whole_rows(given);
  const auto mean = means_of(out, grad, bounds);
  on_device_of(out, "segment_mean_backward",
               [&](cudaStream_t stream) { return mm::cuda::segment_mean_backward(mean, stream); });
}

// The operators: NAME allocates, NAME_out checks what it is given.  The host's segment table is for the CPU: per-token
// places are here already.

void pack_out(Tensors streams, Tensor, Tensor modality_ids, Tensor source_rows, Tensor out) {
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous(), "packing: out must be contiguous [T, E]");
  for (const Tensor& stream : streams) {
    check_matrix(stream);
    check_apart(stream, out);
  }
  write_pack(streams, modality_ids, source_rows, out);
}

Tensor pack(Tensors streams, Tensor, Tensor modality_ids, Tensor source_rows, int64_t total) {
  STD_TORCH_CHECK(!streams.empty(), "packing: no streams");
  for (const Tensor& stream : streams) check_matrix(stream);
  Tensor out = new_tensor(streams[0], std::array{total, streams[0].size(1)});
  write_pack(streams, modality_ids, source_rows, out);
  return out;
}

void unpack_out(Tensor packed, Tensor, Tensor modality_ids, Tensor source_rows, Tensors out) {
  check_matrix(packed);
  check_outputs(packed, out);
  write_unpack(packed, modality_ids, source_rows, out);
}

Tensors unpack(Tensor packed, Tensor, Tensor modality_ids, Tensor source_rows, std::vector<int64_t> stream_lengths) {
  check_matrix(packed);
  Tensors streams;
  for (const int64_t length : stream_lengths) streams.push_back(new_tensor(packed, std::array{length, packed.size(1)}));
  write_unpack(packed, modality_ids, source_rows, streams);
  return streams;
}

void pad_out(Tensor packed, Tensor bounds, Tensor out, Tensor mask) {
  check_matrix(packed);
  check_padded(packed, out, mask);
  write_pad(packed, bounds, out, mask);
}

std::tuple<Tensor, Tensor> pad(Tensor packed, Tensor bounds, int64_t length) {
  check_matrix(packed);
  const int64_t B = bounds.size(0) - 1;
  Tensor out = new_tensor(packed, std::array{B, length, packed.size(1)});
  Tensor mask = new_tensor(packed, std::array{B, length}, true);
  write_pad(packed, bounds, out, mask);
  return {out, mask};
}

void unpad_out(Tensor padded, Tensor bounds, Tensor out) {
  check_shape(out, out.size(0), padded);
  check_apart(padded, out);
  write_unpad(padded, bounds, out);
}

Tensor unpad(Tensor padded, Tensor bounds, int64_t total) {
  STD_TORCH_CHECK(padded.dim() == 3, "packing: padded must be [B, L, E]");
  Tensor out = new_tensor(padded, std::array{total, padded.size(2)});
  write_unpad(padded, bounds, out);
  return out;
}

// For the operators that turn rows into `count` rows.
template <auto write, class... Where>
Tensor rows_to_rows(const Tensor& in, int64_t count, const Where&... where) {
  check_matrix(in);
  Tensor out = new_tensor(in, std::array{count, in.size(1)});
  write(in, where..., out);
  return out;
}

template <auto write, class... Where>
void rows_to_rows_out(const Tensor& in, int64_t count, const Tensor& out, const Where&... where) {
  check_matrix(in);
  check_shape(out, count, in);
  check_apart(in, out);
  write(in, where..., out);
}

Tensor gather_rows(Tensor packed, Tensor rows) { return rows_to_rows<write_gather_rows>(packed, rows.size(0), rows); }
void gather_rows_out(Tensor packed, Tensor rows, Tensor out) {
  rows_to_rows_out<write_gather_rows>(packed, rows.size(0), out, rows);
}
Tensor sum_sorted_rows(Tensor grad, Tensor sorted, Tensor order, int64_t total) {
  return rows_to_rows<write_sum_sorted_rows>(grad, total, sorted, order);
}
void sum_sorted_rows_out(Tensor grad, Tensor sorted, Tensor order, Tensor out) {
  rows_to_rows_out<write_sum_sorted_rows>(grad, out.size(0), out, sorted, order);
}
Tensor segment_mean(Tensor packed, Tensor bounds) {
  return rows_to_rows<write_segment_mean>(packed, bounds.size(0) - 1, bounds);
}
void segment_mean_out(Tensor packed, Tensor bounds, Tensor out) {
  rows_to_rows_out<write_segment_mean>(packed, bounds.size(0) - 1, out, bounds);
}
Tensor segment_mean_backward(Tensor grad, Tensor bounds, int64_t total) {
  return rows_to_rows<write_segment_mean_backward>(grad, total, bounds);
}
void segment_mean_backward_out(Tensor grad, Tensor bounds, Tensor out) {
  rows_to_rows_out<write_segment_mean_backward>(grad, out.size(0), out, bounds);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mm_cuda, CUDA, m) {
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
  m.impl("sum_sorted_rows", TORCH_BOX(&sum_sorted_rows));
  m.impl("sum_sorted_rows_out", TORCH_BOX(&sum_sorted_rows_out));
  m.impl("segment_mean", TORCH_BOX(&segment_mean));
  m.impl("segment_mean_out", TORCH_BOX(&segment_mean_out));
  m.impl("segment_mean_backward", TORCH_BOX(&segment_mean_backward));
  m.impl("segment_mean_backward_out", TORCH_BOX(&segment_mean_backward_out));
}
