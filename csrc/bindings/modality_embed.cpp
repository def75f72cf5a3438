// torch.ops.mm_cpp.{modality_embed_fwd, modality_embed_bwd}: copies what does not lie as it must, allocates, computes.
// Schemas: ops/modality_embed/cpp_impl.py
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <span>
#include <vector>

#include "bindings/modality_embed_views.h"

namespace {

using namespace mm::bindings;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Optional = std::optional<Tensor>;

Tensor fresh(ScalarType type, std::span<const int64_t> sizes) {
  const int64_t strides[2] = {sizes.size() == 2 ? std::max<int64_t>(1, sizes[1]) : 1, 1};
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made = nullptr;
  const AOTITorchError error = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides,
                                                        dtype, aoti_torch_device_type_cpu(), 0, &made);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "modality_embed: there is no memory for a result of ",
                  sizes[0] * strides[0], " elements");
  return Tensor(made);
}

// The arguments, and the copies that live as long as they are read.
struct Given {
  EmbedArguments views;
  Tensors copies;

  View whole(const char* name, const Tensor& t) {
    const View view = view_of(t, name);
    if (t.is_contiguous()) return view;
    copies.push_back(torch::stable::contiguous(t));
    return view_of(copies.back());
  }
  std::optional<View> whole(const char* name, const Optional& t) {
    return t ? std::optional(whole(name, *t)) : std::nullopt;
  }
  // A vector of the norm in fp32; parameters have one dtype.
  std::optional<View> floats(const char* name, const Optional& given, const Tensor& modality) {
    if (!given) return std::nullopt;
    STD_TORCH_CHECK(given->scalar_type() == modality.scalar_type() && given->dim() == 1,
                    "modality_embed: parameters must have one dtype, and those of the norm [E]");
    if (given->scalar_type() == ScalarType::Float) return whole(name, *given);
    check_memory(name, *given);
    copies.push_back(torch::stable::to(*given, ScalarType::Float));
    return whole(name, Tensor(copies.back()));
  }
};

Given given_of(const Tensors& streams, const Tensor& modality, const Optional& token, const Tensors& tables,
               std::vector<int64_t> table_counts, const Optional& norm_weight, const Optional& norm_bias,
               const Tensor& modality_ids, const Tensor& source_rows, const Tensor& positions, const Optional& rng,
               int64_t norm, double dropout_p, bool read_streams) {
  Given given;
  EmbedArguments& views = given.views;
  for (const Tensor& stream : streams) {
    const View view = view_of(stream, "a stream");
    views.streams.push_back(read_streams || holds_ids(view) ? given.whole("a stream", stream) : view);
  }
  views.modality = given.whole("modality_weight", modality);
  views.token = given.whole("token_weight", token);
  for (const Tensor& table : tables) views.tables.push_back(given.whole("a position table", table));
  views.table_counts = std::move(table_counts);
  views.norm_weight = given.floats("norm_weight", norm_weight, modality);
  views.norm_bias = given.floats("norm_bias", norm_bias, modality);
  views.modality_ids = given.whole("modality_ids", modality_ids);
  views.source_rows = given.whole("source_rows", source_rows);
  views.positions = given.whole("positions", positions);
  views.rng = given.whole("rng", rng);
  views.norm = norm;
  views.dropout_p = dropout_p;
  return given;
}

// The result [T, E]; then mean [T] and rstd [T], where the norm has them.
Tensors modality_embed_fwd(Tensors streams, Tensor modality, Optional token, Tensors tables,
                           std::vector<int64_t> table_counts, Optional norm_weight, Optional norm_bias,
                           Tensor modality_ids, Tensor source_rows, Tensor positions, Optional rng, int64_t norm,
                           double eps, double dropout_p, std::optional<ScalarType> out_dtype) {
  Given given = given_of(streams, modality, token, tables, std::move(table_counts), norm_weight, norm_bias,
                         modality_ids, source_rows, positions, rng, norm, dropout_p, true);
  given.views.eps = eps;
  STD_TORCH_CHECK(modality.dim() == 2, "modality_embed: modality_weight must be [M, E]");
  const int64_t sizes[2] = {modality_ids.size(0), modality.size(1)};
  Tensors results{fresh(out_dtype ? *out_dtype : result_type(given.views), sizes)};
  const auto statistic = [&](bool has) -> float* {
    if (!has) return nullptr;
    results.push_back(fresh(ScalarType::Float, {sizes, 1}));
    return static_cast<float*>(results.back().data_ptr());
  };
  float* mean = statistic(has_mean(norm));
  float* rstd = statistic(has_rstd(norm));
  write_embed(given.views, view_of(results[0]), mean, rstd);
  return results;
}

// Gradients that are needed, in the order of `needs`: streams, modality, token, tables, norm weight, norm bias.
Tensors modality_embed_bwd(Tensor grad_out, Tensors streams, Tensor modality, Optional token, Tensors tables,
                           std::vector<int64_t> table_counts, Optional norm_weight, Tensor modality_ids,
                           Tensor source_rows, Tensor positions, Optional rng, int64_t norm, double dropout_p,
                           Optional mean, Optional rstd, std::vector<int64_t> needs) {
  Given given = given_of(streams, modality, token, tables, std::move(table_counts), norm_weight, std::nullopt,
                         modality_ids, source_rows, positions, rng, norm, dropout_p, has_rstd(norm));
  STD_TORCH_CHECK(needs.size() == streams.size() + tables.size() + 4,
                  "modality_embed: the gradient does not match the inputs");
  // Whose shape each gradient has.
  const int64_t width = modality.dim() == 2 ? modality.size(1) : 0;
  View vector;  // of the norm
  vector.sizes = &width;
  vector.dims = 1;
  std::vector<View> leaves = given.views.streams;
  leaves.push_back(given.views.modality);
  leaves.push_back(given.views.token.value_or(View{}));
  leaves.insert(leaves.end(), given.views.tables.begin(), given.views.tables.end());
  leaves.insert(leaves.end(), 2, vector);
  std::vector<View> gradients(needs.size());
  Tensors results;
  results.reserve(needs.size());
  size_t of_streams = 0;
  for (size_t i = 0; i < needs.size(); ++i) {
    if (!needs[i]) continue;
    const View& leaf = leaves[i];
    const bool stream = i < streams.size();
    of_streams += stream;
    STD_TORCH_CHECK(leaf.dims == 1 || leaf.dims == 2, "modality_embed: rows must be [N, ", width, "]");
    results.push_back(fresh(stream ? leaf.type : ScalarType::Float, {leaf.sizes, static_cast<size_t>(leaf.dims)}));
    gradients[i] = view_of(results.back());
  }
  write_embed_backward(given.views, given.whole("the gradient", grad_out), given.whole("mean", mean),
                       given.whole("rstd", rstd), gradients);
  if (modality.scalar_type() != ScalarType::Float) {
    for (size_t i = of_streams; i < results.size(); ++i) {
      results[i] = torch::stable::to(results[i], modality.scalar_type());
    }
  }
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mm_cpp, CPU, m) {
  m.impl("modality_embed_fwd", TORCH_BOX(&modality_embed_fwd));
  m.impl("modality_embed_bwd", TORCH_BOX(&modality_embed_bwd));
}
