// mmkernels._C as a Python module: packing for plain calls, past torch's dispatcher, which on a short batch costs more
// than the copy.   Every function checks all of its arguments, and returns None for whatever it cannot or may not do: a
// gradient, a tracer, a subclass, a wrong shape.   The caller goes the long way then, which does it or says what is
// wrong.   Left out where Python's headers are missing at build time.
#if __has_include(<Python.h>)
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <vector>

#include "bindings/dlpack_exchange.h"
#include "bindings/packing_tensors.h"
#include "bindings/packing_view.h"
#include "bindings/packing_writes.h"

namespace {

using namespace mm::bindings;

// What this module needs of torch in Python; set once by connect() and kept for the life of the process.
struct Torch {
  PyObject *module, *boolean;
  PyTypeObject *tensor, *parameter;
  // Who may be looking on: each is a function without arguments, and what it returns where nobody is.
  struct Watch {
    PyObject *ask, *quiet;
  };
  std::vector<Watch> watches;
  PyObject *increment_version, *is_neg;
  PyObject *requires_grad, *dtype, *empty_strided;  // names
  int (*view)(void* object, dlpack::Tensor* out);
};
Torch torch_python{};

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

Owned kept(PyObject* object) {
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

std::optional<ScalarType> type_of(const dlpack::Tensor& t) {
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

// The tensor of a plain Python object on the CPU.  Rows must be whole.
View view_of(PyObject* object) {
  const PyTypeObject* type = Py_TYPE(object);
  if (type != torch_python.tensor && type != torch_python.parameter) throw Refused{};
  dlpack::Tensor t;
  if (torch_python.view(object, &t) != 0 || t.device_type != dlpack::kCPU) throw Refused{};
  const std::optional<ScalarType> scalar = type_of(t);
  if (!scalar || t.dims == 0 || t.strides == nullptr) throw Refused{};
  if (t.strides[t.dims - 1] != 1 && t.sizes[t.dims - 1] != 0) throw Refused{};
  return {static_cast<char*>(t.data) + t.byte_offset, t.sizes, t.strides, t.dims, *scalar, t.type_bits / size_t{8}};
}

// The same, of a tensor whose values count: its memory holds them, not their negatives, and where gradients are
// recorded one that asks for a gradient is refused.
View values_of(PyObject* object, bool recording) {
  const View view = view_of(object);
  if (Owned(PyObject_CallFunctionObjArgs(torch_python.is_neg, object, nullptr)).get() != Py_False) throw Refused{};
  if (recording && Owned(PyObject_GetAttr(object, torch_python.requires_grad)).get() != Py_False) throw Refused{};
  return view;
}

constexpr size_t kMost = 32;  // modalities of a layout: as many tensors as a call may take, without asking for memory

// The tensors of a list or tuple, kept alive while nobody holds the interpreter's lock.
class Tensors {
 public:
  Tensors(PyObject* object, bool recording) : Tensors() {  // whole from here on: what is kept is let go on an exception
    const bool list = PyList_CheckExact(object);
    if (!list && !PyTuple_CheckExact(object)) throw Refused{};
    const Py_ssize_t size = list ? PyList_Size(object) : PyTuple_Size(object);
    if (size > static_cast<Py_ssize_t>(kMost)) throw Refused{};
    for (; count_ < static_cast<size_t>(size); ++count_) {
      const auto i = static_cast<Py_ssize_t>(count_);
      PyObject* item = list ? PyList_GetItem(object, i) : PyTuple_GetItem(object, i);
      views_[count_] = values_of(item, recording);
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
  PyObject* objects_[kMost];
  View views_[kMost];
};

int64_t integer_of(PyObject* object) {
  const long long value = PyLong_CheckExact(object) ? PyLong_AsLongLong(object) : -1;
  if (value < 0) throw Refused{};
  return value;
}

// (segment table as bytes, number of modalities), as checks.segments makes it; the caller holds the tuple.
struct Table {
  explicit Table(PyObject* object) {
    char* bytes = nullptr;
    Py_ssize_t size = 0;
    if (!PyTuple_CheckExact(object) || PyTuple_Size(object) != 2) throw Refused{};
    if (PyBytes_AsStringAndSize(PyTuple_GetItem(object, 0), &bytes, &size) != 0) throw Refused{};
    segments = {reinterpret_cast<const int32_t*>(bytes), size / static_cast<Py_ssize_t>(4 * sizeof(int32_t))};
    modalities = static_cast<size_t>(integer_of(PyTuple_GetItem(object, 1)));
  }
  Segments segments;
  size_t modalities;
};

Owned empty(std::initializer_list<int64_t> sizes, PyObject* dtype) {
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

Owned empty_like(std::initializer_list<int64_t> sizes, PyObject* like) {
  const Owned dtype(PyObject_GetAttr(like, torch_python.dtype));
  return empty(sizes, dtype.get());
}

// Says that these tensors, a list or tuple, are written now: autograd refuses what it saved of them before.
void will_write(PyObject* tensors) {
  Owned(PyObject_CallFunctionObjArgs(torch_python.increment_version, tensors, nullptr));
}

// An output: `given`, or a new tensor where that is None.
struct Result {
  Owned object;
  View view;
  Output output;
};
template <class... Sizes>
Result result_of(PyObject* given, bool recording, PyObject* like, Sizes... sizes) {
  const bool fresh = given == Py_None;
  Owned object = fresh ? empty_like({sizes...}, like) : kept(given);
  const View view = fresh ? view_of(object.get()) : values_of(object.get(), recording);
  if (!fresh) {
    const Owned one(PyTuple_New(1));
    PyTuple_SetItem(one.get(), 0, kept(given).release());
    will_write(one.get());
  }
  return {std::move(object), view, fresh ? Output::kNew : Output::kGiven};
}

void refuse_if_watched() {
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

// (streams, table, out) -> packed
Owned pack(Arguments arguments, bool recording) {
  const Tensors streams(arguments[0], recording);
  const Table table(arguments[1]);
  if (streams.size() == 0 || streams.size() != table.modalities) throw Refused{};
  int64_t total = 0;
  for (int64_t n = 0; n < table.segments.count; ++n) total += table.segments.table[4 * n + 2];
  Result out = result_of(arguments[2], recording, streams.object(0), total, streams[0].size(1));
  const WithoutGil free;
  write_pack(streams.views(), table.segments, out.view, out.output);
  return std::move(out.object);
}

Owned new_streams(const Table& table, int64_t width, PyObject* like) {
  std::vector<int64_t> lengths(table.modalities);
  for (int64_t n = 0; n < table.segments.count; ++n) {
    const int32_t* row = table.segments.table + 4 * n;
    lengths.at(row[1]) += row[2];
  }
  Owned list(PyList_New(0));
  for (const int64_t rows : lengths) {
    if (PyList_Append(list.get(), empty_like({rows, width}, like).get()) != 0) throw Refused{};
  }
  return list;
}

// (packed, table, out) -> list of streams
Owned unpack(Arguments arguments, bool recording) {
  const View packed = values_of(arguments[0], recording);
  const Table table(arguments[1]);
  const bool fresh = arguments[2] == Py_None;
  Owned streams = fresh ? new_streams(table, packed.size(1), arguments[0]) : Owned(PySequence_List(arguments[2]));
  const Tensors out(streams.get(), recording);
  if (out.size() != table.modalities) throw Refused{};
  if (!fresh) will_write(streams.get());
  const WithoutGil free;
  write_unpack(packed, table.segments, out.views(), fresh ? Output::kNew : Output::kGiven);
  return streams;
}

// (packed, bounds, length, out) -> (padded, mask)
Owned pad(Arguments arguments, bool recording) {
  const View packed = values_of(arguments[0], recording), bounds = view_of(arguments[1]);
  const int64_t length = integer_of(arguments[2]), samples = bounds.size(0) - 1;
  const bool fresh = arguments[3] == Py_None;
  Owned pair = fresh ? Owned(PyTuple_New(2)) : kept(arguments[3]);
  if (fresh) {
    PyTuple_SetItem(pair.get(), 0, empty_like({samples, length, packed.size(1)}, arguments[0]).release());
    PyTuple_SetItem(pair.get(), 1, empty({samples, length}, torch_python.boolean).release());
  }
  const Tensors out(pair.get(), recording);
  if (out.size() != 2 || out[0].size(1) != length) throw Refused{};
  if (!fresh) will_write(pair.get());
  const WithoutGil free;
  write_pad(packed, bounds, out[0], out[1], fresh ? Output::kNew : Output::kGiven);
  return pair;
}

// (padded, bounds, number of rows, out) -> packed
Owned unpad(Arguments arguments, bool recording) {
  const View padded = values_of(arguments[0], recording), bounds = view_of(arguments[1]);
  Result out = result_of(arguments[3], recording, arguments[0], integer_of(arguments[2]), padded.size(2));
  const WithoutGil free;
  write_unpad(padded, bounds, out.view, out.output);
  return std::move(out.object);
}

// (packed, rows, out) -> rows of packed
Owned gather_rows(Arguments arguments, bool recording) {
  const View packed = values_of(arguments[0], recording), rows = values_of(arguments[1], false);
  Result out = result_of(arguments[2], recording, arguments[0], rows.size(0), packed.size(1));
  const WithoutGil free;
  write_gather_rows(packed, rows, out.view, out.output);
  return std::move(out.object);
}

// (packed, bounds, out) -> a mean per segment
Owned segment_mean(Arguments arguments, bool recording) {
  const View packed = values_of(arguments[0], recording), bounds = view_of(arguments[1]);
  Result out = result_of(arguments[2], recording, arguments[0], bounds.size(0) - 1, packed.size(1));
  const WithoutGil free;
  write_segment_mean(packed, bounds, out.view, out.output);
  return std::move(out.object);
}

Owned attribute(PyObject* object, const char* name) { return Owned(PyObject_GetAttrString(object, name)); }

// connect(torch, torch._C._increment_version, who may be looking on, as a tuple of pairs: a function and what it
// returns where nobody is) -> whether the functions above can serve.   What they keep of torch lives as long as the
// process.
PyObject* connect(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  if (given != 3) {
    PyErr_SetString(PyExc_TypeError, "connect: expected torch, a function and a tuple of pairs");
    return nullptr;
  }
  try {
    PyObject* torch = arguments[0];
    Owned tensor = attribute(torch, "Tensor"), parameter = attribute(attribute(torch, "nn").get(), "Parameter");
    const Owned capsule = attribute(tensor.get(), "__dlpack_c_exchange_api__");
    const auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.get(), dlpack::kCapsuleName));
    while (api != nullptr && api->major > dlpack::kMajorVersion) api = api->previous;
    if (api == nullptr || api->major != dlpack::kMajorVersion || api->tensor_from_object == nullptr) throw Refused{};
    std::vector<Torch::Watch> watches;
    for (Py_ssize_t i = 0; i < PyTuple_Size(arguments[2]); ++i) {
      PyObject* pair = PyTuple_GetItem(arguments[2], i);
      const auto item = [&](Py_ssize_t at) { return Owned(PySequence_GetItem(pair, at)).release(); };
      watches.push_back({item(0), item(1)});
    }
    PyObject* tensor_type = tensor.get();
    torch_python = {.module = kept(torch).release(),
                    .boolean = attribute(torch, "bool").release(),
                    .tensor = reinterpret_cast<PyTypeObject*>(tensor.release()),
                    .parameter = reinterpret_cast<PyTypeObject*>(parameter.release()),
                    .watches = std::move(watches),
                    .increment_version = kept(arguments[1]).release(),
                    .is_neg = attribute(tensor_type, "is_neg").release(),
                    .requires_grad = PyUnicode_InternFromString("requires_grad"),
                    .dtype = PyUnicode_InternFromString("dtype"),
                    .empty_strided = PyUnicode_InternFromString("empty_strided"),
                    .view = api->tensor_from_object};
    Py_RETURN_TRUE;
  } catch (...) {  // this torch offers no exchange
    PyErr_Clear();
    Py_RETURN_FALSE;
  }
}

template <class Function>
PyMethodDef method(const char* name, Function* function, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, doc};
}

PyMethodDef methods[] = {
    method("connect", connect, "connect(torch, increment_version, watches) -> bool"),
    method("pack", plainly<3, pack>, "pack(streams, table, out) -> packed or None"),
    method("unpack", plainly<3, unpack>, "unpack(packed, table, out) -> streams or None"),
    method("pad", plainly<4, pad>, "pad(packed, bounds, length, out) -> (padded, mask) or None"),
    method("unpad", plainly<4, unpad>, "unpad(padded, bounds, total, out) -> packed or None"),
    method("gather_rows", plainly<3, gather_rows>, "gather_rows(packed, rows, out) -> rows or None"),
    method("segment_mean", plainly<3, segment_mean>, "segment_mean(packed, bounds, out) -> means or None"),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "mmkernels._C",
                          "CPU operators; here, packing for plain calls.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
#endif
