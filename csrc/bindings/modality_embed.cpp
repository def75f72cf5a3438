// torch.ops.mm_cpp.{modality_embed_fwd, modality_embed_bwd}: unwrap tensors, call, raise.   Schemas:
// ops/modality_embed/cpp_impl.py, which also allocates and makes everything contiguous.
#include "cpu/modality_embed.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

Kind kind_of(const Tensor& t) {
  switch (t.scalar_type()) {
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

// `read` is false where only shape and dtype matter (backward without a norm gets stand-ins for the streams).
Rows rows_of(const Tensor& t, int64_t E, bool read = true) {
  const Kind kind = kind_of(t);
  const bool ids = kind == Kind::kI32 || kind == Kind::kI64;
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

float* floats(const Optional& t, int64_t numel) { return t ? data_of<float>(*t, ScalarType::Float, numel) : nullptr; }

// [T], or null for a statistic that the norm does not have.
float* statistics(const Tensor& t, const embed::Inputs& in, bool there) {
  float* data = data_of<float>(t, ScalarType::Float, there ? in.T : 0);
  return there ? data : nullptr;
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

embed::Inputs inputs_of(const Tensors& streams, const Tensor& modality, const Optional& token, const Tensors& tables,
                        const std::vector<int64_t>& table_counts, const Optional& norm_weight,
                        const Optional& norm_bias, const Tensor& modality_ids, const Tensor& source_rows,
                        const Tensor& positions, const Optional& rng, int64_t threshold, double scale, int64_t norm,
                        bool read_streams) {
  embed::Inputs in;
  in.T = modality_ids.size(0);
  in.E = modality.size(1);
  in.A = positions.size(0);
  STD_TORCH_CHECK(0 <= norm && norm <= 2, "modality_embed: norm is ", norm);
  in.norm = static_cast<embed::Norm>(norm);
  in.modality = rows_of(modality, in.E);
  STD_TORCH_CHECK(in.modality.rows == static_cast<int64_t>(streams.size()) && table_counts.size() == streams.size(),
                  "modality_embed: modality_weight and table_counts must have one entry per stream");
  for (const Tensor& stream : streams) in.streams.push_back(rows_of(stream, in.E, read_streams));
  if (token) in.token = rows_of(*token, in.E);
  for (const Tensor& table : tables) {
    in.tables.push_back(rows_of(table, in.E));
    STD_TORCH_CHECK(in.tables.back().kind == in.modality.kind, "modality_embed: tables must have one dtype");
  }
  in.first_table.push_back(0);
  for (int64_t count : table_counts) {
    STD_TORCH_CHECK(0 <= count && count <= 3, "modality_embed: a modality has at most 3 position tables");
    in.first_table.push_back(in.first_table.back() + static_cast<int>(count));
  }
  STD_TORCH_CHECK(in.first_table.back() == static_cast<int>(tables.size()),
                  "modality_embed: table_counts do not add up");
  in.norm_weight = floats(norm_weight, in.E);
  in.norm_bias = floats(norm_bias, in.E);
  in.modality_ids = data_of<uint8_t>(modality_ids, ScalarType::Byte, in.T);
  in.source_rows = data_of<int32_t>(source_rows, ScalarType::Int, in.T);
  in.positions = data_of<int32_t>(positions, ScalarType::Int, in.A * in.T);
  if (rng) {
    const int64_t* words = data_of<int64_t>(*rng, ScalarType::Long, 2);
    const auto seed = static_cast<uint64_t>(words[0]);
    in.dropout.on = true;
    in.dropout.key[0] = static_cast<uint32_t>(seed);
    in.dropout.key[1] = static_cast<uint32_t>(seed >> 32);
    in.dropout.offset = static_cast<uint32_t>(words[1]);
    in.dropout.threshold = static_cast<uint32_t>(threshold);
    in.dropout.scale = static_cast<float>(scale);
  }
  return in;
}

void parallel(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (n > 0) torch::stable::parallel_for(0, n, grain, body);
}

void modality_embed_fwd(Tensors streams, Tensor modality, Optional token, Tensors tables,
                        std::vector<int64_t> table_counts, Optional norm_weight, Optional norm_bias,
                        Tensor modality_ids, Tensor source_rows, Tensor positions, Optional rng, int64_t threshold,
                        double scale, int64_t norm, double eps, Tensor out, Tensor mean, Tensor rstd) {
  embed::Inputs in = inputs_of(streams, modality, token, tables, table_counts, norm_weight, norm_bias, modality_ids,
                               source_rows, positions, rng, threshold, scale, norm, true);
  in.eps = static_cast<float>(eps);
  const Rows rows = rows_of(out, in.E);
  STD_TORCH_CHECK(rows.rows == in.T, "modality_embed: the result has ", rows.rows, " rows, expected ", in.T);
  advise_large_pages(out);
  const std::string error = embed::forward(in, rows, statistics(mean, in, in.norm == embed::Norm::kLayer),
                                           statistics(rstd, in, in.norm != embed::Norm::kNone), parallel);
  STD_TORCH_CHECK(error.empty(), error);
}

// Gradients with no element are not wanted.
void modality_embed_bwd(Tensor grad_out, Tensors streams, Tensor modality, Optional token, Tensors tables,
                        std::vector<int64_t> table_counts, Optional norm_weight, Tensor modality_ids,
                        Tensor source_rows, Tensor positions, Tensor mean, Tensor rstd, Optional rng, int64_t threshold,
                        double scale, int64_t norm, Tensors d_streams, Optional d_modality, Optional d_token,
                        Tensors d_tables, Optional d_norm_weight, Optional d_norm_bias) {
  const embed::Inputs in = inputs_of(streams, modality, token, tables, table_counts, norm_weight, std::nullopt,
                                     modality_ids, source_rows, positions, rng, threshold, scale, norm, norm != 0);
  embed::Grads grads;
  grads.out = rows_of(grad_out, in.E);
  STD_TORCH_CHECK(grads.out.rows == in.T && d_streams.size() == streams.size() && d_tables.size() == tables.size(),
                  "modality_embed: gradients do not match their inputs");
  grads.mean = statistics(mean, in, in.norm == embed::Norm::kLayer);
  grads.rstd = statistics(rstd, in, in.norm != embed::Norm::kNone);
  for (size_t m = 0; m < streams.size(); ++m) {
    const bool wanted = d_streams[m].numel() > 0;
    grads.streams.push_back(wanted ? rows_of(d_streams[m], in.E) : Rows{});
    STD_TORCH_CHECK(!wanted || grads.streams[m].rows == in.streams[m].rows, "modality_embed: d_streams ", m,
                    " differs");
    if (wanted) advise_large_pages(d_streams[m]);
  }
  for (size_t i = 0; i < tables.size(); ++i) {
    const bool wanted = d_tables[i].numel() > 0;
    grads.tables.push_back(wanted ? data_of<float>(d_tables[i], ScalarType::Float, tables[i].numel()) : nullptr);
  }
  grads.modality = floats(d_modality, modality.numel());
  grads.token = token ? floats(d_token, token->numel()) : nullptr;
  if (grads.token) advise_large_pages(*d_token);
  grads.norm_weight = floats(d_norm_weight, in.E);
  grads.norm_bias = floats(d_norm_bias, in.E);
  const std::string error = embed::backward(in, grads, parallel);
  STD_TORCH_CHECK(error.empty(), error);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mm_cpp, CPU, m) {
  m.impl("modality_embed_fwd", TORCH_BOX(&modality_embed_fwd));
  m.impl("modality_embed_bwd", TORCH_BOX(&modality_embed_bwd));
}
