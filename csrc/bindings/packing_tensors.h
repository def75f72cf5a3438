// What the packing bindings of both devices ask of tensors: torch's own (Tensor), or a View of one.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <utility>

#include "bindings/view.h"

namespace mm::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The macro of torch's headers for this has changed its name between 2.11 and 2.13.
inline void check_call(AOTITorchError error) {
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "packing: a call into torch failed");
}

template <class T>
int64_t row_bytes_of(const T& t) {
  return t.size(t.dim() - 1) * static_cast<int64_t>(t.element_size());
}

// Whether rows are contiguous inside.
template <class T>
bool has_whole_rows(const T& t) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(last >= 1, "packing: a tensor of rows must have two dimensions or more");
  return t.numel() == 0 || t.size(last) == 1 || t.stride(last) == 1;
}

// The tensor, or a copy whose rows are.
inline Tensor with_whole_rows(const Tensor& t) {
  check_memory("a tensor", t);
  return has_whole_rows(t) ? t : torch::stable::contiguous(t);
}

// The tensor, or a copy that is contiguous: torch is not asked where there is nothing to do.
inline Tensor made_contiguous(const Tensor& t) {
  check_memory("a tensor", t);
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

template <class T>
void check_matrix(const T& t) {
  STD_TORCH_CHECK(t.dim() == 2, "packing: expected a tensor with two dimensions, got ", t.dim());
}

template <class A, class B>
void check_alike(const A& a, const B& b) {
  STD_TORCH_CHECK(a.size(a.dim() - 1) == b.size(b.dim() - 1) && a.scalar_type() == b.scalar_type(),
                  "packing: rows must have one width and dtype");
}

template <class T>
void check_shape(const T& t, int64_t rows, const T& like) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.is_contiguous(), "packing: out must be contiguous with ", rows,
                  " rows");
  check_alike(t, like);
}

// The dtype of a sum, as either device's kernels name it.
template <class DType, class T>
DType sum_type_of(const T& t) {
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

// The rows of [T, E], or of one sample of [B, L, E].
template <class Rows, class T>
Rows rows_as(const T& t) {
  return {static_cast<char*>(t.data_ptr()), t.stride(t.dim() - 2) * static_cast<int64_t>(t.element_size())};
}

// First byte, and one past the last.
template <class T>
std::pair<const char*, const char*> bytes_of(const T& t) {
  const auto* data = static_cast<const char*>(t.data_ptr());
  if (t.numel() == 0) return {data, data};
  int64_t reach = 1;
  for (int64_t d = 0; d < t.dim(); ++d) reach += (t.size(d) - 1) * t.stride(d);
  return {data, data + reach * static_cast<int64_t>(t.element_size())};
}

// Rows are copied in any order and by several threads.
template <class T>
void check_apart(const T& in, const T& out) {
  const auto [begin, end] = bytes_of(in);
  const auto [first, last] = bytes_of(out);
  STD_TORCH_CHECK(begin == end || first == last || begin >= last || first >= end,
                  "packing: out shares memory with an input");
}

// Outputs of unpack: contiguous, apart from the input and from one another.
template <class T, class List>
void check_outputs(const T& packed, const List& out) {
  for (size_t m = 0; m < out.size(); ++m) {
    STD_TORCH_CHECK(out[m].dim() == 2 && out[m].is_contiguous(), "packing: out must be contiguous [rows, E]");
    check_apart(packed, out[m]);
    for (size_t other = 0; other < m; ++other) check_apart(out[other], out[m]);
  }
}

template <class T>
void check_padded(const T& packed, const T& out, const T& mask) {
  STD_TORCH_CHECK(out.dim() == 3 && out.is_contiguous() && mask.scalar_type() == ScalarType::Bool &&
                      mask.is_contiguous() && mask.numel() == out.size(0) * out.size(1),
                  "packing: out must be contiguous [B, L, E], mask bool [B, L]");
  check_apart(packed, out);
  check_apart(packed, mask);
  check_apart(out, mask);
}

// New memory on the device of `like`, contiguous.
template <size_t D>
Tensor new_tensor(const Tensor& like, const std::array<int64_t, D>& sizes, bool boolean = false) {
  std::array<int64_t, D> strides;
  int64_t stride = 1;
  for (size_t d = D; d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  int32_t dtype = aoti_torch_dtype_bool(), device = 0;
  if (!boolean) check_call(aoti_torch_get_dtype(like.get(), &dtype));
  check_call(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made = nullptr;
  const AOTITorchError error =
      aoti_torch_empty_strided(D, sizes.data(), strides.data(), dtype, device, like.get_device_index(), &made);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "packing: there is no memory for a result of ", stride, " elements");
  return Tensor(made);
}

}  // namespace mm::bindings
