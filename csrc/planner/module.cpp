// Python module mmkernels._planner: numpy arrays in and out, GIL released. mmkernels/planner.py is its documented face.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstring>
#include <tuple>
#include <vector>

#include "layout.h"
#include "packs.h"
#include "ranks.h"
#include "tiles.h"
#include "vector_packs.h"

namespace py = pybind11;
using namespace mm::planner;

namespace {

using Int32s = py::array_t<int32_t, py::array::c_style>;
using Int64s = py::array_t<int64_t, py::array::c_style>;
using Doubles = py::array_t<double, py::array::c_style>;

// What plan() returns, while other Python threads run.  It touches no Python object: pointers are taken before.
template <typename Plan>
auto without_gil(const Plan& plan) {
  const py::gil_scoped_release release;
  return plan();
}

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
  const LayoutInput in{.segments = segments.data(),
                       .grids = grids.data(),
                       .special_ids = special_ids.data(),
                       .num_segments = segments.shape(0),
                       .num_modalities = special_ids.size(),
                       .num_samples = num_samples,
                       .axes = axes};
  const int64_t total = without_gil([&] { return check_layout(in); });
  Int32s buffer(layout_sections(num_samples, in.num_segments, total, axes).end);
  int32_t* data = buffer.mutable_data();
  const auto bytes = static_cast<size_t>(buffer.nbytes());
  without_gil([&] {
    std::memset(data, 0, bytes);
    fill_layout(in, total, data);
  });
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
  const TileSchedule schedule = without_gil([&] { return attention_tiles(in); });
  return py::make_tuple(to_numpy(schedule.tiles), to_numpy(schedule.spans), schedule.pairs);
}

template <typename Length>
py::tuple py_plan_packs(const py::array_t<Length, py::array::c_style>& lengths, int64_t budget, int64_t max_items,
                        bool first_fit) {
  Int64s order(lengths.size());
  const PacksInput in{.num_items = lengths.size(), .budget = budget, .max_items = max_items, .first_fit = first_fit};
  const Length* data = lengths.data();
  int64_t* written = order.mutable_data();
  const std::vector<int64_t> offsets = without_gil([&] { return plan_packs(in, data, written); });
  return py::make_tuple(order, to_numpy(offsets));
}

py::tuple py_group_by_pack(const Int64s& pack_of, int64_t packs) {
  Int64s order(pack_of.size());
  const int64_t* data = pack_of.data();
  int64_t* written = order.mutable_data();
  const int64_t items = order.size();
  const std::vector<int64_t> offsets = without_gil([&] { return group_by_bin(data, items, packs, written); });
  return py::make_tuple(order, to_numpy(offsets));
}

VectorPacksInput vector_input(const Int64s& lengths, const Int64s& budgets, const Doubles& scales, int64_t max_items) {
  return {.lengths = lengths.data(),
          .budgets = budgets.data(),
          .scales = scales.data(),
          .num_items = lengths.shape(0),
          .num_budgets = lengths.shape(1),
          .max_items = max_items};
}

py::tuple py_pool_fit(const Int64s& lengths, const Int64s& budgets, const Doubles& scales, int64_t max_items,
                      const Doubles& sizes, const Doubles& weights) {
  const VectorPacksInput in = vector_input(lengths, budgets, scales, max_items);
  Int64s pack_of(in.num_items);
  const double *size = sizes.data(), *weight = weights.data();
  int64_t* written = pack_of.mutable_data();
  const int64_t packs = without_gil([&] { return pool_fit(in, size, weight, written); });
  return py::make_tuple(pack_of, packs);
}

py::tuple py_scan_fit(const Int64s& lengths, const Int64s& budgets, const Doubles& scales, int64_t max_items,
                      int64_t max_open, bool first, const std::tuple<Int64s, Int64s, Int64s, int64_t>& state) {
  const VectorPacksInput in = vector_input(lengths, budgets, scales, max_items);
  const auto& [ids, counts, room, next_id] = state;
  OpenBins open{.ids = {ids.data(), ids.data() + ids.size()},
                .counts = {counts.data(), counts.data() + counts.size()},
                .room = {room.data(), room.data() + room.size()},
                .next_id = next_id};
  Int64s pack_of(in.num_items);
  int64_t* written = pack_of.mutable_data();
  const std::vector<int64_t> closed = without_gil([&] { return scan_fit(in, open, max_open, first, written); });
  const std::vector<py::ssize_t> shape{static_cast<py::ssize_t>(open.ids.size()),
                                       static_cast<py::ssize_t>(in.num_budgets)};
  return py::make_tuple(pack_of, to_numpy(closed), to_numpy(open.ids), to_numpy(open.counts),
                        to_numpy(open.room).reshape(shape), open.next_id);
}

Int64s py_balance_ranks(const Doubles& costs, const Int64s& order, int64_t num_ranks, bool equal_count) {
  const RanksInput in{.costs = costs.data(),
                      .order = order.data(),
                      .num_items = costs.shape(0),
                      .num_costs = costs.shape(1),
                      .num_ranks = num_ranks,
                      .equal_count = equal_count};
  return to_numpy(without_gil([&] { return balance_ranks(in); }));
}

}  // namespace

PYBIND11_MODULE(_planner, m) {
  m.doc() = "Host-side planning in C++; call it through mmkernels.planner, which checks types and shapes.";
  m.def("build_layout", &py_build_layout);
  m.def("attention_tiles", &py_attention_tiles);
  m.def("plan_packs", &py_plan_packs<int32_t>);
  m.def("plan_packs", &py_plan_packs<int64_t>);
  m.def("pool_fit", &py_pool_fit);
  m.def("scan_fit", &py_scan_fit);
  m.def("group_by_pack", &py_group_by_pack);
  m.def("balance_ranks", &py_balance_ranks);
}
