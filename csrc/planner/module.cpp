// Python module mmkernels._planner: numpy arrays in and out, GIL released. mmkernels/planner.py is its documented face.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "layout.h"
#include "packs.h"
#include "tiles.h"

namespace py = pybind11;
using namespace mm::planner;

namespace {

using Int32s = py::array_t<int32_t, py::array::c_style>;
using Int64s = py::array_t<int64_t, py::array::c_style>;

Int64s to_numpy(const std::vector<int64_t>& values) {
  return Int64s(static_cast<py::ssize_t>(values.size()), values.data());
}

template <size_t Width>
Int32s to_numpy(const std::vector<std::array<int32_t, Width>>& rows) {
  Int32s out({static_cast<py::ssize_t>(rows.size()), static_cast<py::ssize_t>(Width)});
  if (!rows.empty()) std::memcpy(out.mutable_data(), rows.data(), rows.size() * sizeof(rows[0]));
  return out;
}

Int32s py_build_layout(const Int32s& segments, const Int32s& grids, const Int32s& special_ids, int64_t num_samples,
                       int64_t axes) {
  const LayoutInput in{segments.data(), grids.data(), special_ids.data(), segments.shape(0), special_ids.size(),
                       num_samples,     axes};
  int64_t total = 0;
  {
    py::gil_scoped_release release;
    total = check_layout(in);
  }
  Int32s buffer(layout_sections(num_samples, in.num_segments, total, axes).end);
  int32_t* data = buffer.mutable_data();
  const auto bytes = static_cast<size_t>(buffer.nbytes());
  {
    py::gil_scoped_release release;
    std::memset(data, 0, bytes);
    fill_layout(in, total, data);
  }
  return buffer;
}

py::tuple py_attention_tiles(const Int32s& cu_rows, const Int32s& cu_cols, const Int32s& lo, const Int32s& hi,
                             const Int32s& row_bits, const Int32s& col_bits, int64_t block_rows, int64_t block_cols,
                             bool rows_are_keys) {
  const TilesInput in{.cu_rows = cu_rows.data(),
                      .cu_cols = cu_cols.data(),
                      .lo = lo.data(),
                      .hi = hi.data(),
                      .row_bits = reinterpret_cast<const uint32_t*>(row_bits.data()),
                      .col_bits = reinterpret_cast<const uint32_t*>(col_bits.data()),
                      .num_samples = cu_rows.size() - 1,
                      .num_rows = lo.size(),
                      .num_cols = col_bits.size(),
                      .block_rows = block_rows,
                      .block_cols = block_cols,
                      .rows_are_keys = rows_are_keys};
  TileSchedule schedule;
  {
    py::gil_scoped_release release;
    schedule = attention_tiles(in);
  }
  return py::make_tuple(to_numpy(schedule.tiles), to_numpy(schedule.spans), schedule.pairs);
}

Policy policy_of(const std::string& name) {
  if (name == "best_fit") return Policy::kBestFit;
  if (name == "first_fit") return Policy::kFirstFit;
  if (name == "stream") return Policy::kStream;
  throw std::invalid_argument("plan_packs: no policy is called " + name);
}

py::tuple py_plan_packs(const Int64s& lengths, const Int64s& budgets, int64_t max_items, const std::string& policy) {
  const PacksInput in{lengths.data(), budgets.data(), lengths.shape(0), lengths.shape(1), max_items, policy_of(policy)};
  Packs packs;
  {
    py::gil_scoped_release release;
    packs = plan_packs(in);
  }
  return py::make_tuple(to_numpy(packs.order), to_numpy(packs.offsets));
}

}  // namespace

PYBIND11_MODULE(_planner, m) {
  m.doc() = "Host-side planning in C++; call it through mmkernels.planner, which checks types and shapes.";
  m.def("build_layout", &py_build_layout);
  m.def("attention_tiles", &py_attention_tiles);
  m.def("plan_packs", &py_plan_packs);
}
