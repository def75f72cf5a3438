// A tensor's memory, shape and strides, whoever owns the tensor: torch behind its stable ABI, or a Python object.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <span>

namespace mm::bindings {

// Method names as of torch::stable::Tensor, whose every getter is a call into torch.   It does not keep the tensor
// alive.
struct View {
  void* data = nullptr;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int64_t dims = 0;
  torch::headeronly::ScalarType type{};
  size_t item_bytes = 0;

  void* data_ptr() const { return data; }
  int64_t dim() const { return dims; }
  int64_t size(int64_t d) const { return sizes[checked(d)]; }
  int64_t stride(int64_t d) const { return strides[checked(d)]; }
  size_t element_size() const { return item_bytes; }
  torch::headeronly::ScalarType scalar_type() const { return type; }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t d = 0; d < dims; ++d) count *= sizes[d];
    return count;
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    bool contiguous = true;
    for (int64_t d = dims; d-- > 0; expected *= sizes[d]) {
      if (sizes[d] == 0) return true;
      contiguous &= sizes[d] == 1 || strides[d] == expected;
    }
    return contiguous;
  }

  int64_t checked(int64_t d) const {
    STD_TORCH_CHECK(d >= 0 && d < dims, "mmkernels: a tensor has ", dims, " dimensions, expected more");
    return d;
  }
};

using Views = std::span<const View>;

// Refuses a tensor whose storage holds less than it spans: who resizes a storage (to 0, to free it) leaves the
// shapes of its tensors as they were.
inline void check_memory(const char* name, const torch::stable::Tensor& t) {
  if (t.numel() == 0) return;
  int64_t held = 0, reach = 0;
  STD_TORCH_CHECK(aoti_torch_get_storage_size(t.get(), &held) == AOTI_TORCH_SUCCESS &&
                      aoti_torch_get_storage_offset(t.get(), &reach) == AOTI_TORCH_SUCCESS,
                  "mmkernels: a call into torch failed");
  ++reach;
  for (int64_t d = 0; d < t.dim(); ++d) reach += (t.size(d) - 1) * t.stride(d);
  reach *= static_cast<int64_t>(t.element_size());
  STD_TORCH_CHECK(reach <= held, "mmkernels: ", name, " lies in a storage of ", held, " bytes, expected ", reach,
                  ": the storage was resized");
}

inline View view_of(const torch::stable::Tensor& t, const char* name = "a tensor") {
  check_memory(name, t);
  return {t.data_ptr(), t.sizes().data(), t.strides().data(), t.dim(), t.scalar_type(), t.element_size()};
}

}  // namespace mm::bindings
