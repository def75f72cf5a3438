// mmkernels._C as a Python module: operators for plain calls on the CPU, past torch's dispatcher, which on a short
// batch costs more than they do.   Left out where Python's headers are missing at build time.
#if __has_include(<Python.h>)
#include "bindings/python_objects.h"

namespace mm::bindings::python {
namespace {

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
                    .float32 = attribute(torch, "float32").release(),
                    .tensor = reinterpret_cast<PyTypeObject*>(tensor.release()),
                    .parameter = reinterpret_cast<PyTypeObject*>(parameter.release()),
                    .watches = std::move(watches),
                    .increment_version = kept(arguments[1]).release(),
                    .is_neg = attribute(tensor_type, "is_neg").release(),
                    .requires_grad = PyUnicode_InternFromString("requires_grad"),
                    .dtype = PyUnicode_InternFromString("dtype"),
                    .empty_strided = PyUnicode_InternFromString("empty_strided"),
                    .empty_like = PyUnicode_InternFromString("empty_like"),
                    .view = api->tensor_from_object};
    Py_RETURN_TRUE;
  } catch (...) {  // this torch offers no exchange
    PyErr_Clear();
    Py_RETURN_FALSE;
  }
}

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "mmkernels._C",
                          "CPU operators; here, for plain calls.",
                          -1,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyObject* module() {
  // The module keeps pointers to the entries.
  static std::vector<PyMethodDef> methods = [] {
    std::vector<PyMethodDef> all{method("connect", connect, "connect(torch, increment_version, watches) -> bool")};
    for (const auto& some : {packing_methods(), modality_embed_methods()})
      all.insert(all.end(), some.begin(), some.end());
    all.push_back({nullptr, nullptr, 0, nullptr});
    return all;
  }();
  definition.m_methods = methods.data();
  return PyModule_Create(&definition);
}

}  // namespace mm::bindings::python

PyMODINIT_FUNC PyInit__C() { return mm::bindings::python::module(); }
#endif
