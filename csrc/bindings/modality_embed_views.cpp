// See modality_embed_views.h.
#include "bindings/modality_embed_views.h"

#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <string>

namespace mm::bindings {
namespace {

namespace embed = mm::cpu::embed;
using embed::Kind;
using embed::Rows;
using torch::headeronly::ScalarType;

Kind kind_of(const View& t) {
  switch (t.type) {
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
Rows rows_of(const View& t, int64_t E, bool read = true) {
  const bool ids = holds_ids(t);
  STD_TORCH_CHECK(t.dim() == (ids ? 1 : 2) && (ids || t.size(1) == E), "modality_embed: rows must be [N, ", E, "]");
  STD_TORCH_CHECK(!(read || ids) || t.is_contiguous(), "modality_embed: rows must be contiguous");
  return {t.data, t.size(0), kind_of(t)};
}

template <class T>
const T* data_of(const View& t, ScalarType type, int64_t numel) {
  STD_TORCH_CHECK(t.type == type && t.is_contiguous() && t.numel() == numel,
                  "modality_embed: expected a contiguous tensor of ", numel, " elements");
  return static_cast<const T*>(t.data);
}

Rows parameter_of(const View& t, const embed::Inputs& in) {
  const Rows rows = rows_of(t, in.E);
  STD_TORCH_CHECK(rows.kind == in.modality.kind, "modality_embed: parameters must have one dtype");
  return rows;
}

embed::Inputs inputs_of(const EmbedArguments& arguments, bool read_streams) {
  embed::Inputs in;
  STD_TORCH_CHECK(arguments.modality.dim() == 2 && arguments.positions.dim() == 2,
                  "modality_embed: modality_weight must be [M, E]");
  in.T = arguments.modality_ids.size(0);
  in.E = arguments.modality.size(1);
  in.A = arguments.positions.size(0);
  STD_TORCH_CHECK(0 <= arguments.norm && arguments.norm <= 2, "modality_embed: norm is ", arguments.norm);
  in.norm = static_cast<embed::Norm>(arguments.norm);
  in.eps = static_cast<float>(arguments.eps);
  in.modality = rows_of(arguments.modality, in.E);
  const size_t M = arguments.streams.size();
  STD_TORCH_CHECK(in.modality.rows == static_cast<int64_t>(M) && arguments.table_counts.size() == M,
                  "modality_embed: modality_weight and table_counts must have one entry per stream");
  for (const View& stream : arguments.streams) in.streams.push_back(rows_of(stream, in.E, read_streams));
  if (arguments.token) in.token = parameter_of(*arguments.token, in);
  for (const View& table : arguments.tables) in.tables.push_back(parameter_of(table, in));
  in.first_table.push_back(0);
  for (const int64_t count : arguments.table_counts) {
    STD_TORCH_CHECK(0 <= count && count <= 3, "modality_embed: a modality has at most 3 position tables");
    in.first_table.push_back(in.first_table.back() + static_cast<int>(count));
  }
  STD_TORCH_CHECK(in.first_table.back() == static_cast<int>(arguments.tables.size()),
                  "modality_embed: table_counts do not add up");
  STD_TORCH_CHECK((!arguments.norm_weight || arguments.norm_weight->dim() == 1) &&
                      (!arguments.norm_bias || arguments.norm_bias->dim() == 1),
                  "modality_embed: norm_weight and norm_bias must be [E]");
  if (arguments.norm_weight) in.norm_weight = data_of<float>(*arguments.norm_weight, ScalarType::Float, in.E);
  if (arguments.norm_bias) in.norm_bias = data_of<float>(*arguments.norm_bias, ScalarType::Float, in.E);
  in.modality_ids = data_of<uint8_t>(arguments.modality_ids, ScalarType::Byte, in.T);
  in.source_rows = data_of<int32_t>(arguments.source_rows, ScalarType::Int, in.T);
  in.positions = data_of<int32_t>(arguments.positions, ScalarType::Int, in.A * in.T);
  if (arguments.rng) {
    const int64_t* words = data_of<int64_t>(*arguments.rng, ScalarType::Long, 2);
    const auto seed = static_cast<uint64_t>(words[0]);
    in.dropout.on = true;
    in.dropout.key[0] = static_cast<uint32_t>(seed);
    in.dropout.key[1] = static_cast<uint32_t>(seed >> 32);
    in.dropout.offset = static_cast<uint32_t>(words[1]);
    // as mmkernels/philox.py rounds it: to even
    in.dropout.threshold = static_cast<uint32_t>(std::min(std::nearbyint(arguments.dropout_p * 0x1p32), 0x1p32 - 1));
    in.dropout.scale = static_cast<float>(1.0 / (1.0 - arguments.dropout_p));
  }
  return in;
}

// Asks for pages of 2 MiB under a large result: a fresh page costs more than the 4 KiB that go into it.  Advice only.
void advise_large_pages([[maybe_unused]] const View& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const auto start = reinterpret_cast<uintptr_t>(t.data);
  const uintptr_t first = (start + kPage - 1) / kPage * kPage;
  const uintptr_t last = (start + static_cast<uintptr_t>(t.numel()) * t.item_bytes) / kPage * kPage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void parallel(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (n > 0) torch::stable::parallel_for(0, n, grain, body);
}

}  // namespace

bool holds_ids(const View& stream) { return stream.type == ScalarType::Int || stream.type == ScalarType::Long; }

ScalarType result_type(const EmbedArguments& arguments) {
  const View* found = nullptr;
  for (const View& stream : arguments.streams) {
    if (holds_ids(stream) || stream.size(0) == 0) continue;
    if (found != nullptr && found->type != stream.type) return ScalarType::Float;
    found = &stream;
  }
  return (found ? *found : arguments.modality).type;
}

bool has_mean(int64_t norm) { return norm == static_cast<int64_t>(embed::Norm::kLayer); }
bool has_rstd(int64_t norm) { return norm != static_cast<int64_t>(embed::Norm::kNone); }

void write_embed(const EmbedArguments& arguments, const View& out, float* mean, float* rstd) {
  const embed::Inputs in = inputs_of(arguments, true);
  const Rows rows = rows_of(out, in.E);
  STD_TORCH_CHECK(rows.rows == in.T && !holds_ids(out), "modality_embed: the result must be [T, E]");
  advise_large_pages(out);
  const std::string error = embed::forward(in, rows, mean, rstd, parallel);
  STD_TORCH_CHECK(error.empty(), error);
}

void write_embed_backward(const EmbedArguments& arguments, const View& grad_out, const std::optional<View>& mean,
                          const std::optional<View>& rstd, const std::vector<View>& gradients) {
  const bool centred = has_mean(arguments.norm), normed = has_rstd(arguments.norm);
  const embed::Inputs in = inputs_of(arguments, normed);
  embed::Grads grads;
  grads.out = rows_of(grad_out, in.E);
  STD_TORCH_CHECK(grads.out.rows == in.T && gradients.size() == in.streams.size() + in.tables.size() + 4 &&
                      (!centred || mean) && (!normed || rstd),
                  "modality_embed: the gradient does not match the inputs");
  if (centred) grads.mean = data_of<float>(*mean, ScalarType::Float, in.T);
  if (normed) grads.rstd = data_of<float>(*rstd, ScalarType::Float, in.T);
  auto next = gradients.begin();
  for (const Rows& stream : in.streams) {
    const View& gradient = *next++;
    grads.streams.push_back(Rows{});
    if (gradient.dims == 0) continue;
    Rows& rows = grads.streams.back() = rows_of(gradient, in.E);
    STD_TORCH_CHECK(!holds_ids(gradient), "modality_embed: ids have no gradient");
    STD_TORCH_CHECK(rows.rows == stream.rows && rows.kind == stream.kind,
                    "modality_embed: a stream's gradient must be like the stream");
    if (gradient.numel() == 0) rows.data = nullptr;
  }
  const auto parameter = [&](int64_t rows) -> float* {
    const View& gradient = *next++;
    if (gradient.dims == 0) return nullptr;
    return const_cast<float*>(data_of<float>(gradient, ScalarType::Float, rows * in.E));
  };
  grads.modality = parameter(in.modality.rows);
  grads.token = parameter(in.token.rows);
  for (const Rows& table : in.tables) grads.tables.push_back(parameter(table.rows));
  grads.norm_weight = parameter(1);
  grads.norm_bias = parameter(1);
  for (const View& gradient : gradients) advise_large_pages(gradient);
  const std::string error = embed::backward(in, grads, parallel);
  STD_TORCH_CHECK(error.empty(), error);
}

}  // namespace mm::bindings
