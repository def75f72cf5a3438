// Packing for plain calls from Python.   T tokens, E width, B samples, L padded length.
#if __has_include(<Python.h>)
#include "bindings/packing_writes.h"
#include "bindings/python_objects.h"

namespace mm::bindings::python {
namespace {

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

}  // namespace

std::vector<PyMethodDef> packing_methods() {
  return {
      method("pack", plainly<3, pack>, "pack(streams, table, out) -> packed or None"),
      method("unpack", plainly<3, unpack>, "unpack(packed, table, out) -> streams or None"),
      method("pad", plainly<4, pad>, "pad(packed, bounds, length, out) -> (padded, mask) or None"),
      method("unpad", plainly<4, unpad>, "unpad(padded, bounds, total, out) -> packed or None"),
      method("gather_rows", plainly<3, gather_rows>, "gather_rows(packed, rows, out) -> rows or None"),
      method("segment_mean", plainly<3, segment_mean>, "segment_mean(packed, bounds, out) -> means or None"),
  };
}

}  // namespace mm::bindings::python
#endif
