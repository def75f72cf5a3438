// torch.ops.mm_cpp.{modality_embed_fwd, modality_embed_bwd}: check, allocate, call, raise.   Schemas:
// ops/modality_embed/cpp_impl.py.   All that a call needs is done in here: with caches cold, each step costs Python
// microseconds.
#include "cpu/modality_embed.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

namespace {

namespace embed = mm::cpu::embed;
using embed::Kind;
using embed::Rows;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Optional = std::optional<Tensor>;

Kind kind_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Kind::kF32;
    case ScalarType::BFloat16:
      return Kind::kBF16;
    case ScalarType::Half:
      return Kind::kF16;
    case ScalarType::Int:
      return Kind::kI32;
    case ScalarType::Long:
      return Kind::kI64;
    default:
      STD_TORCH_CHECK(false, "modality_embed: the C++ path takes fp32, bf16, fp16 rows and int32, int64 ids");
  }
}

bool holds_ids(Kind kind) { return kind == Kind::kI32 || kind == Kind::kI64; }

// `read` is false where only shape and dtype matter (backward without a norm gets stand-ins for the streams).
Rows rows_of(const Tensor& t, int64_t E, bool read = true) {
  const Kind kind = kind_of(t.scalar_type());
  const bool ids = holds_ids(kind);
  STD_TORCH_CHECK(t.dim() == (ids ? 1 : 2) && (ids || t.size(1) == E), "modality_embed: rows must be [N, ", E, "]");
  STD_TORCH_CHECK(!(read || ids) || t.is_contiguous(), "modality_embed: rows must be contiguous");
  return {t.data_ptr(), t.size(0), kind};
}

template <class T>
T* data_of(const Tensor& t, ScalarType type, int64_t numel) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == numel,
                  "modality_embed: expected a contiguous tensor of ", numel, " elements");
  return static_cast<T*>(t.data_ptr());
}

// The macro of torch's headers for this has changed its name between 2.11 and 2.13.
void check_call(AOTITorchError error) {
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "modality_embed: a call into torch failed");
}

Tensor fresh(int32_t dtype, std::initializer_list<int64_t> sizes) {
  const int64_t strides[2] = {sizes.size() == 2 ? std::max<int64_t>(1, sizes.begin()[1]) : 1, 1};
  AtenTensorHandle made = nullptr;
  const AOTITorchError error = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                                        dtype, aoti_torch_device_type_cpu(), 0, &made);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "modality_embed: there is no memory for a result of ",
                  sizes.begin()[0] * strides[0], " elements");
  return Tensor(made);
}

Tensor fresh_floats(std::initializer_list<int64_t> sizes) { return fresh(aoti_torch_dtype_float32(), sizes); }

Tensor fresh_like(const Tensor& t, std::initializer_list<int64_t> sizes) {
  int32_t dtype = 0;
  check_call(aoti_torch_get_dtype(t.get(), &dtype));
  return fresh(dtype, sizes);
}

// Asks for pages of 2 MiB under a large result: a fresh page costs more than the 4 KiB that go into it.  Advice only.
void advise_large_pages([[maybe_unused]] const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const auto start = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t first = (start + kPage - 1) / kPage * kPage;
  const uintptr_t last = (start + static_cast<uintptr_t>(t.numel()) * t.element_size()) / kPage * kPage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// What both directions are given, and the copies that live as long as it is read.
struct Given {
  embed::Inputs in;
  Tensors copies;

  const Tensor& whole(const Tensor& t) {
    if (t.is_contiguous()) return t;
    copies.push_back(torch::stable::contiguous(t));
    return copies.back();
  }
  // A vector of the norm in fp32; parameters have one dtype.
  const float* floats(const Optional& given, const Tensor& modality) {
    if (!given) return nullptr;
    STD_TORCH_CHECK(given->scalar_type() == modality.scalar_type() && given->dim() == 1,
                    "modality_embed: parameters must have one dtype, and those of the norm [E]");
    if (given->scalar_type() == ScalarType::Float) return data_of<float>(whole(*given), ScalarType::Float, in.E);
    copies.push_back(torch::stable::to(*given, ScalarType::Float));
    return data_of<float>(whole(copies.back()), ScalarType::Float, in.E);
  }
};

Given inputs_of(const Tensors& streams, const Tensor& modality, const Optional& token, const Tensors& tables,
                const std::vector<int64_t>& table_counts, const Optional& norm_weight, const Optional& norm_bias,
                const Tensor& modality_ids, const Tensor& source_rows, const Tensor& positions, const Optional& rng,
                double dropout_p, int64_t norm, bool read_streams) {
  Given given;
  given.copies.reserve(streams.size() + tables.size() + 16);  // references to its elements must stay
  embed::Inputs& in = given.in;
  STD_TORCH_CHECK(modality.dim() == 2 && positions.dim() == 2, "modality_embed: modality_weight must be [M, E]");
  in.T = modality_ids.size(0);
  in.E = modality.size(1);
  in.A = positions.size(0);
  STD_TORCH_CHECK(0 <= norm && norm <= 2, "modality_embed: norm is ", norm);
  in.norm = static_cast<embed::Norm>(norm);
  in.modality = rows_of(given.whole(modality), in.E);
  STD_TORCH_CHECK(in.modality.rows == static_cast<int64_t>(streams.size()) && table_counts.size() == streams.size(),
                  "modality_embed: modality_weight and table_counts must have one entry per stream");
  for (const Tensor& stream : streams) {
    const bool read = read_streams || holds_ids(kind_of(stream.scalar_type()));
    in.streams.push_back(rows_of(read ? given.whole(stream) : stream, in.E, read));
  }
  if (token) {
    in.token = rows_of(given.whole(*token), in.E);
    STD_TORCH_CHECK(in.token.kind == in.modality.kind, "modality_embed: parameters must have one dtype");
  }
  for (const Tensor& table : tables) {
    in.tables.push_back(rows_of(given.whole(table), in.E));
    STD_TORCH_CHECK(in.tables.back().kind == in.modality.kind, "modality_embed: parameters must have one dtype");
  }
  in.first_table.push_back(0);
  for (int64_t count : table_counts) {
    STD_TORCH_CHECK(0 <= count && count <= 3, "modality_embed: a modality has at most 3 position tables");
    in.first_table.push_back(in.first_table.back() + static_cast<int>(count));
  }
  STD_TORCH_CHECK(in.first_table.back() == static_cast<int>(tables.size()),
                  "modality_embed: table_counts do not add up");
  in.norm_weight = given.floats(norm_weight, modality);
  in.norm_bias = given.floats(norm_bias, modality);
  in.modality_ids = data_of<uint8_t>(given.whole(modality_ids), ScalarType::Byte, in.T);
  in.source_rows = data_of<int32_t>(given.whole(source_rows), ScalarType::Int, in.T);
  in.positions = data_of<int32_t>(given.whole(positions), ScalarType::Int, in.A * in.T);
  if (rng) {
    const int64_t* words = data_of<int64_t>(given.whole(*rng), ScalarType::Long, 2);
    const auto seed = static_cast<uint64_t>(words[0]);
    in.dropout.on = true;
    in.dropout.key[0] = static_cast<uint32_t>(seed);
    in.dropout.key[1] = static_cast<uint32_t>(seed >> 32);
    in.dropout.offset = static_cast<uint32_t>(words[1]);
    // as mmkernels/philox.py rounds it: to even
    in.dropout.threshold = static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 0x1p32), 0x1p32 - 1));
    in.dropout.scale = static_cast<float>(1.0 / (1.0 - dropout_p));
  }
  return given;
}

void parallel(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (n > 0) torch::stable::parallel_for(0, n, grain, body);
}

// What the float streams that have rows promote to, else the parameters' dtype.
int32_t result_dtype(const Tensors& streams, const Tensor& modality) {
  const Tensor* found = nullptr;
  for (const Tensor& stream : streams) {
    if (holds_ids(kind_of(stream.scalar_type())) || stream.size(0) == 0) continue;
    if (found != nullptr && found->scalar_type() != stream.scalar_type()) return aoti_torch_dtype_float32();
    found = &stream;
  }
  int32_t dtype = 0;
  check_call(aoti_torch_get_dtype((found ? *found : modality).get(), &dtype));
  return dtype;
}

// The result [T, E]; then mean [T] and rstd [T], where the norm has them.
Tensors modality_embed_fwd(Tensors streams, Tensor modality, Optional token, Tensors tables,
                           std::vector<int64_t> table_counts, Optional norm_weight, Optional norm_bias,
                           Tensor modality_ids, Tensor source_rows, Tensor positions, Optional rng, int64_t norm,
                           double eps, double dropout_p, std::optional<ScalarType> out_dtype) {
  Given given = inputs_of(streams, modality, token, tables, table_counts, norm_weight, norm_bias, modality_ids,
                          source_rows, positions, rng, dropout_p, norm, true);
  embed::Inputs& in = given.in;
  in.eps = static_cast<float>(eps);
  const int32_t dtype = out_dtype ? torch::stable::detail::to<int32_t>(torch::stable::detail::from(*out_dtype))
                                  : result_dtype(streams, modality);
  Tensors results{fresh(dtype, {in.T, in.E})};
  float *mean = nullptr, *rstd = nullptr;
  for (float** statistic : {&mean, &rstd}) {
    if (in.norm == embed::Norm::kNone || (statistic == &mean && in.norm == embed::Norm::kRms)) continue;
    results.push_back(fresh_floats({in.T}));
    *statistic = static_cast<float*>(results.back().data_ptr());
  }
  advise_large_pages(results[0]);
  const std::string error = embed::forward(in, rows_of(results[0], in.E), mean, rstd, parallel);
  STD_TORCH_CHECK(error.empty(), error);
  return results;
}

// Gradients that are needed, in the order of `needs`: streams, modality, token, tables, norm weight, norm bias.
Tensors modality_embed_bwd(Tensor grad_out, Tensors streams, Tensor modality, Optional token, Tensors tables,
                           std::vector<int64_t> table_counts, Optional norm_weight, Tensor modality_ids,
                           Tensor source_rows, Tensor positions, Optional rng, int64_t norm, double dropout_p,
                           Optional mean, Optional rstd, std::vector<int64_t> needs) {
  Given given = inputs_of(streams, modality, token, tables, table_counts, norm_weight, std::nullopt, modality_ids,
                          source_rows, positions, rng, dropout_p, norm, norm != 0);
  const embed::Inputs& in = given.in;
  const bool normed = in.norm != embed::Norm::kNone, centred = in.norm == embed::Norm::kLayer;
  embed::Grads grads;
  grads.out = rows_of(given.whole(grad_out), in.E);
  STD_TORCH_CHECK(grads.out.rows == in.T && needs.size() == streams.size() + tables.size() + 4 && (!centred || mean) &&
                      (!normed || rstd),
                  "modality_embed: the gradient does not match the inputs");
  if (centred) grads.mean = data_of<float>(*mean, ScalarType::Float, in.T);
  if (normed) grads.rstd = data_of<float>(*rstd, ScalarType::Float, in.T);
  Tensors results;
  results.reserve(needs.size());
  auto need = needs.begin();
  for (size_t m = 0; m < streams.size(); ++m) {
    grads.streams.push_back(Rows{});
    if (!*need++) continue;
    STD_TORCH_CHECK(!holds_ids(in.streams[m].kind), "modality_embed: ids have no gradient");
    results.push_back(fresh_like(streams[m], {in.streams[m].rows, in.E}));
    advise_large_pages(results.back());
    grads.streams[m] = rows_of(results.back(), in.E);
    if (results.back().numel() == 0) grads.streams[m].data = nullptr;
  }
  // Gradients of parameters are summed in fp32.
  const size_t first = results.size();
  const auto parameter = [&](bool vector, int64_t rows) -> float* {
    if (!*need++) return nullptr;
    results.push_back(vector ? fresh_floats({in.E}) : fresh_floats({rows, in.E}));
    advise_large_pages(results.back());
    return static_cast<float*>(results.back().data_ptr());
  };
  grads.modality = parameter(false, in.modality.rows);
  grads.token = parameter(false, in.token.rows);
  for (const Rows& table : in.tables) grads.tables.push_back(parameter(false, table.rows));
  grads.norm_weight = parameter(true, 0);
  grads.norm_bias = parameter(true, 0);
  const std::string error = embed::backward(in, grads, parallel);
  STD_TORCH_CHECK(error.empty(), error);
  if (modality.scalar_type() != ScalarType::Float) {
    for (size_t i = first; i < results.size(); ++i) results[i] = torch::stable::to(results[i], modality.scalar_type());
  }
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mm_cpp, CPU, m) {
  m.impl("modality_embed_fwd", TORCH_BOX(&modality_embed_fwd));
  m.impl("modality_embed_bwd", TORCH_BOX(&modality_embed_bwd));
}
