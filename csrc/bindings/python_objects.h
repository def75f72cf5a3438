// Python objects as the functions of mmkernels._C see them, past torch's dispatcher: which tensors may be read and
// written as they lie, and who may be looking on.   A function checks all of its arguments, and returns None for
// whatever it cannot or may not do: a tracer, a subclass, a wrong shape; in packing, a gradient.   The caller goes the
// long way then, which does it or says what is wrong.
#pragma once

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "bindings/dlpack_exchange.h"
#include "bindings/view.h"

namespace mm::bindings::python {

using torch::headeronly::ScalarType;

// What this module needs of torch in Python; set once by connect() and kept for the life of the process.
struct Torch {
  PyObject *module, *boolean, *float32;
  PyTypeObject *tensor, *parameter;
  // Who may be looking on: each is a function without arguments, and what it returns where nobody is.
  struct Watch {
    PyObject *ask, *quiet;
  };
  std::vector<Watch> watches;
  PyObject *increment_version, *is_neg;
  PyObject *requires_grad, *dtype, *empty_strided, *empty_like;  // names
  int (*view)(void* object, dlpack::Tensor* out);
};
inline Torch torch_python{};

struct Refused {};  // thrown where the caller has to go the long way

// A new reference that goes with its scope.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {
    if (object == nullptr) throw Refused{};
  }
  Owned(Owned&& other) noexcept : object_(other.release()) {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject* object_;
};

inline Owned kept(PyObject* object) {
  Py_INCREF(object);
  return Owned(object);
}

// Other Python threads run meanwhile.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;
  ~WithoutGil() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

inline std::optional<ScalarType> type_of(const dlpack::Tensor& t) {
  if (t.type_lanes != 1) return std::nullopt;
  switch (t.type_code << 8 | t.type_bits) {
    case dlpack::kFloat << 8 | 32:
      return ScalarType::Float;
    case dlpack::kBfloat << 8 | 16:
      return ScalarType::BFloat16;
    case dlpack::kFloat << 8 | 16:
      return ScalarType::Half;
    case dlpack::kFloat << 8 | 64:
      return ScalarType::Double;
    case dlpack::kInt << 8 | 64:
      return ScalarType::Long;
    case dlpack::kInt << 8 | 32:
      return ScalarType::Int;
    case dlpack::kUInt << 8 | 8:
      return ScalarType::Byte;
    case dlpack::kBool << 8 | 8:
      return ScalarType::Bool;
    default:
      return std::nullopt;  // the rare ones, and complex numbers: they may be conjugate views
  }
}

// No memory lies below: a storage of no bytes begins at 0, and a view of it so many bytes later.
constexpr uintptr_t kFirstAddress = uintptr_t{1} << 22;

// The tensor of a plain Python object on the CPU.  whole: its rows must be.
inline View view_of(PyObject* object, bool whole = true) {
  const PyTypeObject* type = Py_TYPE(object);
  if (type != torch_python.tensor && type != torch_python.parameter) throw Refused{};
  dlpack::Tensor t;
  if (torch_python.view(object, &t) != 0 || t.device_type != dlpack::kCPU) throw Refused{};
  const std::optional<ScalarType> scalar = type_of(t);
  if (!scalar || t.dims == 0 || t.strides == nullptr) throw Refused{};
  int64_t numel = 1;
  for (int32_t d = 0; d < t.dims; ++d) numel *= t.sizes[d];
  // Zeros that lie nowhere, a functional tensor's wrapper, a storage that was freed.
  if (reinterpret_cast<uintptr_t>(t.data) < kFirstAddress && numel != 0) throw Refused{};
  if (whole && t.strides[t.dims - 1] != 1 && numel != 0) throw Refused{};
  return {static_cast<char*>(t.data) + t.byte_offset, t.sizes, t.strides, t.dims, *scalar, t.type_bits / size_t{8}};
}

// The same, of a tensor whose values count: its memory holds them, not their negatives, and where gradients are
// recorded one that asks for a gradient is refused.
inline View values_of(PyObject* object, bool recording, bool whole = true) {
  const View view = view_of(object, whole);
  if (Owned(PyObject_CallFunctionObjArgs(torch_python.is_neg, object, nullptr)).get() != Py_False) throw Refused{};
  if (recording && Owned(PyObject_GetAttr(object, torch_python.requires_grad)).get() != Py_False) throw Refused{};
  return view;
}

// Of one list, so that it needs no memory of its own: as many as a layout has modalities.  More, as position tables may
// be, go the long way.
constexpr size_t kMostTensors = 32;

// The tensors of a list or tuple, kept alive while nobody holds the interpreter's lock.
class Tensors {
 public:
  Tensors(PyObject* object, bool recording, bool whole = true)
      : Tensors() {  // whole from here on: what is kept is let go on an exception
    const bool list = PyList_CheckExact(object);
    if (!list && !PyTuple_CheckExact(object)) throw Refused{};
    const Py_ssize_t size = list ? PyList_Size(object) : PyTuple_Size(object);
    if (size > static_cast<Py_ssize_t>(kMostTensors)) throw Refused{};
    for (; count_ < static_cast<size_t>(size); ++count_) {
      const auto i = static_cast<Py_ssize_t>(count_);
      PyObject* item = list ? PyList_GetItem(object, i) : PyTuple_GetItem(object, i);
      views_[count_] = values_of(item, recording, whole);
      objects_[count_] = kept(item).release();
    }
  }
  Tensors(const Tensors&) = delete;
  Tensors& operator=(const Tensors&) = delete;
  ~Tensors() {
    for (size_t i = 0; i < count_; ++i) Py_DECREF(objects_[i]);
  }
  size_t size() const { return count_; }
  PyObject* object(size_t i) const { return objects_[i]; }
  Views views() const { return {views_, count_}; }
  const View& operator[](size_t i) const { return views_[i]; }

 private:
  Tensors() = default;

  size_t count_ = 0;
  PyObject* objects_[kMostTensors];
  View views_[kMostTensors];
};

inline int64_t integer_of(PyObject* object) {
  const long long value = PyLong_CheckExact(object) ? PyLong_AsLongLong(object) : -1;
  if (value < 0) throw Refused{};
  return value;
}

inline Owned empty(std::initializer_list<int64_t> sizes, PyObject* dtype) {
  const auto D = static_cast<Py_ssize_t>(sizes.size());
  const Owned shape(PyTuple_New(D)), strides(PyTuple_New(D)), arguments(PyTuple_New(2)), options(PyDict_New());
  int64_t stride = 1;
  for (Py_ssize_t d = D; d-- > 0;) {
    const int64_t size = sizes.begin()[d];
    PyTuple_SetItem(shape.get(), d, PyLong_FromLongLong(size));
    PyTuple_SetItem(strides.get(), d, PyLong_FromLongLong(stride));
    stride *= size > 0 ? size : 1;
  }
  PyTuple_SetItem(arguments.get(), 0, kept(shape.get()).release());
  PyTuple_SetItem(arguments.get(), 1, kept(strides.get()).release());
  PyDict_SetItem(options.get(), torch_python.dtype, dtype);
  const Owned make(PyObject_GetAttr(torch_python.module, torch_python.empty_strided));
  return Owned(PyObject_Call(make.get(), arguments.get(), options.get()));
}

inline Owned empty_like(std::initializer_list<int64_t> sizes, PyObject* like) {
  const Owned dtype(PyObject_GetAttr(like, torch_python.dtype));
  return empty(sizes, dtype.get());
}

// Of the other's shape too.
inline Owned empty_like(PyObject* like) {
  const Owned make(PyObject_GetAttr(torch_python.module, torch_python.empty_like));
  return Owned(PyObject_CallFunctionObjArgs(make.get(), like, nullptr));
}

inline void refuse_if_watched() {
  for (const Torch::Watch& watch : torch_python.watches) {
    if (Owned(PyObject_CallNoArgs(watch.ask)).get() != watch.quiet) throw Refused{};
  }
}

using Arguments = PyObject* const*;

// compute(arguments, whether gradients are recorded) -> a new reference.
template <Py_ssize_t count, Owned (*compute)(Arguments, bool)>
PyObject* plainly(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  if (given != count || torch_python.view == nullptr) Py_RETURN_NONE;
  try {
    refuse_if_watched();
    return compute(arguments, aoti_torch_grad_mode_is_enabled()).release();
  } catch (...) {  // Refused, or a check of what is to be written
    PyErr_Clear();
    Py_RETURN_NONE;
  }
}

template <class Function>
PyMethodDef method(const char* name, Function* function, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, doc};
}

// What mmkernels._C offers of each operator.
std::vector<PyMethodDef> packing_methods();
std::vector<PyMethodDef> modality_embed_methods();

}  // namespace mm::bindings::python
