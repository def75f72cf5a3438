// What we read of DLPack 1.x's C exchange API, a published ABI (dmlc/dlpack, include/dlpack/dlpack.h): torch offers it
// as torch.Tensor.__dlpack_c_exchange_api__, and hides its own copy of the header from users of the stable ABI.
#pragma once

#include <cstdint>

namespace mm::bindings::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr char kCapsuleName[] = "dlpack_exchange_api";

enum DeviceType : int32_t { kCPU = 1 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dims;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* sizes;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void* allocate;
  void* managed_from_object;
  void* object_from_managed;
  // A view of the object's tensor that owns nothing.  0, or -1 with a Python exception.
  int (*tensor_from_object)(void* object, Tensor* out);
  void* current_stream;
};

}  // namespace mm::bindings::dlpack
