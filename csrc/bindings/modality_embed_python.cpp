// modality_embed for plain calls from Python: forward and backward, without autograd, which is in Python.
#if __has_include(<Python.h>)
#include "bindings/modality_embed_views.h"
#include "bindings/python_objects.h"

namespace mm::bindings::python {
namespace {

std::optional<View> view_or_none(PyObject* object) {
  return object == Py_None ? std::nullopt : std::optional(values_of(object, false));
}

double number_of(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (PyErr_Occurred() != nullptr) throw Refused{};
  return value;
}

// Asked first.   Gradients of parameters are summed, and vectors of the norm read, in fp32: others are converted the
// long way.
EmbedArguments of_fp32_parameters(PyObject* modality) {
  EmbedArguments views;
  views.modality = values_of(modality, false);
  if (views.modality.type != ScalarType::Float) throw Refused{};
  return views;
}

// The operator's first arguments, streams to rng, and the norm.   Autograd is above: who asks for a gradient may come.
struct Given {
  Given(Arguments a, int64_t norm)
      : views(of_fp32_parameters(a[1])), streams(a[0], false, has_rstd(norm)), tables(a[3], false) {
    views.streams.assign(streams.views().begin(), streams.views().end());
    views.token = view_or_none(a[2]);
    views.tables.assign(tables.views().begin(), tables.views().end());
    if (!PyList_CheckExact(a[4])) throw Refused{};
    for (Py_ssize_t m = 0; m < PyList_Size(a[4]); ++m)
      views.table_counts.push_back(integer_of(PyList_GetItem(a[4], m)));
    views.norm_weight = view_or_none(a[5]);
    views.norm_bias = view_or_none(a[6]);
    views.modality_ids = view_of(a[7]);
    views.source_rows = view_of(a[8]);
    views.positions = view_of(a[9]);
    views.rng = view_or_none(a[10]);
    views.norm = norm;
  }
  EmbedArguments views;
  Tensors streams, tables;
};

// A tensor of this dtype: a stream or else the parameters, which are fp32.
PyObject* like(const Given& given, PyObject* modality, ScalarType type) {
  for (size_t m = 0; m < given.streams.size(); ++m) {
    if (given.streams[m].type == type) return given.streams.object(m);
  }
  return modality;
}

// (the operator's first 11, norm, eps, dropout_p, dtype or None) -> (out, mean or None, rstd or None)
Owned forward(Arguments a, bool) {
  const int64_t norm = integer_of(a[11]);
  Given given(a, norm);
  given.views.eps = number_of(a[12]);
  given.views.dropout_p = number_of(a[13]);
  const int64_t T = given.views.modality_ids.size(0), E = given.views.modality.size(1);
  Owned results(PyTuple_New(3));
  const auto put = [&](Py_ssize_t at, Owned made) {
    const View view = view_of(made.get());
    PyTuple_SetItem(results.get(), at, made.release());
    return view;
  };
  const auto statistic = [&](Py_ssize_t at, bool has) -> float* {
    if (has) return static_cast<float*>(put(at, empty({T}, torch_python.float32)).data);
    PyTuple_SetItem(results.get(), at, kept(Py_None).release());
    return nullptr;
  };
  const View out =
      put(0, a[14] == Py_None ? empty_like({T, E}, like(given, a[1], result_type(given.views))) : empty({T, E}, a[14]));
  float *mean = statistic(1, has_mean(norm)), *rstd = statistic(2, has_rstd(norm));
  const WithoutGil free;
  write_embed(given.views, out, mean, rstd);
  return results;
}

// (the operator's first 11, norm, dropout_p, grad_out, mean, rstd, needs) -> a tuple: a gradient or None for each need
Owned backward(Arguments a, bool) {
  const int64_t norm = integer_of(a[11]);
  Given given(a, norm);
  given.views.dropout_p = number_of(a[12]);
  const View grad_out = values_of(a[13], false);
  const std::optional<View> mean = view_or_none(a[14]), rstd = view_or_none(a[15]);
  std::vector<PyObject*> leaves;
  for (size_t m = 0; m < given.streams.size(); ++m) leaves.push_back(given.streams.object(m));
  leaves.insert(leaves.end(), {a[1], a[2]});
  for (size_t i = 0; i < given.tables.size(); ++i) leaves.push_back(given.tables.object(i));
  leaves.insert(leaves.end(), {a[5], a[6]});
  PyObject* needs = a[16];
  const auto count = static_cast<Py_ssize_t>(leaves.size());
  if (!PyTuple_CheckExact(needs) || PyTuple_Size(needs) != count) throw Refused{};
  Owned results(PyTuple_New(count));
  std::vector<View> gradients(leaves.size());
  for (Py_ssize_t i = 0; i < count; ++i) {
    const bool needed = PyTuple_GetItem(needs, i) == Py_True;
    Owned made = needed ? empty_like(leaves[i]) : kept(Py_None);
    if (needed) gradients[i] = view_of(made.get());
    PyTuple_SetItem(results.get(), i, made.release());
  }
  const WithoutGil free;
  write_embed_backward(given.views, grad_out, mean, rstd, gradients);
  return results;
}

}  // namespace

std::vector<PyMethodDef> modality_embed_methods() {
  return {
      method("modality_embed_fwd", plainly<15, forward>, "the operator's inputs -> (out, mean, rstd) or None"),
      method("modality_embed_bwd", plainly<17, backward>, "the operator's inputs -> gradients or None"),
  };
}

}  // namespace mm::bindings::python
#endif
