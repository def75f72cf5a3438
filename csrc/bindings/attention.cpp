// torch.ops.mm_cpp.attention_{fwd, bwd, terms}: check, unwrap, call.   Schemas: ops/attention/cpp_impl.py
#include "cpu/attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "bindings/view.h"

namespace {

namespace attention = mm::cpu::attention;
using attention::Heads;
using attention::Inputs;
using mm::cpu::DType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "attention: the C++ path takes fp32, bf16 and fp16");
  }
}

// What check_memory says of a storage of no bytes; of others it would ask torch for each size, at 70 ns a tensor.
void check_not_freed(const char* name, const Tensor& t) {
  int64_t held = 0;
  if (aoti_torch_get_storage_size(t.get(), &held) != AOTI_TORCH_SUCCESS || held == 0)
    mm::bindings::check_memory(name, t);
}

// The tensor, or a copy that lies side by side inside a head: zeros that torch has not written yet come as one number
// with strides of 0, and hooks on saved tensors may give any strides.
Tensor with_whole_heads(const char* name, const Tensor& t) {
  if (t.dim() != 3 || t.numel() == 0 || t.size(2) == 1 || t.stride(2) == 1) return t;
  check_not_freed(name, t);
  return torch::stable::contiguous(t);
}

Optional side_by_side(const char* name, const Optional& t) {
  if (!t || t->is_contiguous()) return t;
  check_not_freed(name, *t);
  return torch::stable::contiguous(*t);
}

Heads heads_of(const char* name, const Tensor& t, const Tensor& like, int64_t tokens, int64_t heads, int64_t width) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == tokens && t.size(1) == heads && t.size(2) == width, "attention: ", name,
                  " must be [", tokens, ", ", heads, ", ", width, "]");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), "attention: ", name, " must have q's dtype");
  STD_TORCH_CHECK(t.numel() == 0 || width == 1 || t.stride(2) == 1, "attention: ", name,
                  " must be contiguous inside a head");
  check_not_freed(name, t);
  const auto size = static_cast<int64_t>(t.element_size());
  return {static_cast<char*>(t.data_ptr()), t.stride(0) * size, t.stride(1) * size};
}

template <class T>
T* data_of(const char* name, const Tensor& t, ScalarType type, int64_t numel) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == numel, "attention: ", name,
                  " must be contiguous with ", numel, " elements");
  check_not_freed(name, t);
  return static_cast<T*>(t.data_ptr());
}

float* floats(const char* name, const Tensor& t, int64_t numel) {
  return data_of<float>(name, t, ScalarType::Float, numel);
}

// Rows of an int32 table whose first columns are ranges [begin, end) inside [0, limits[i]).
const int32_t* ranges_of(const char* name, const Tensor& t, int64_t columns, std::initializer_list<int64_t> limits) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == columns, "attention: ", name, " must be [n, ", columns, "]");
  const auto* table = data_of<int32_t>(name, t, ScalarType::Int, t.numel());
  for (int64_t row = 0; row < t.size(0); ++row) {
    const int32_t* at = table + row * columns;
    for (const int64_t limit : limits) {
      STD_TORCH_CHECK(0 <= at[0] && at[0] <= at[1] && at[1] <= limit, "attention: row ", row, " of ", name,
                      " is out of range");
      at += 2;
    }
  }
  return table;
}

void check_modalities(const int32_t* ids, int64_t tokens, int64_t limit) {
  const bool inside = std::all_of(ids, ids + tokens, [limit](int32_t id) { return 0 <= id && id < limit; });
  STD_TORCH_CHECK(inside, "attention: a modality is out of range of pair_bias or mass");
}

Inputs inputs_of(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bias, const Optional& rng,
                 const Tensor& q_table, const Tensor& k_table, double scale, bool has_visible, double dropout_p,
                 int64_t threshold) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3, "attention: q and k must be [T, heads, D]");
  Inputs in{};
  in.dtype = dtype_of(q);
  in.Tq = q.size(0), in.H = q.size(1), in.D = q.size(2);
  in.Tk = k.size(0), in.G = k.size(1);
  STD_TORCH_CHECK(in.G > 0 && in.H % in.G == 0, "attention: k has ", in.G, " heads, expected a divisor of q's ", in.H);
  STD_TORCH_CHECK(0 < in.D && in.D <= 256, "attention: q has head width ", in.D, ", expected 1 to 256");
  in.q = heads_of("q", q, q, in.Tq, in.H, in.D);
  in.k = heads_of("k", k, q, in.Tk, in.G, in.D);
  in.v = heads_of("v", v, q, in.Tk, in.G, in.D);
  const auto* queries = data_of<int32_t>("q_table", q_table, ScalarType::Int, 4 * in.Tq);
  const auto* keys = data_of<int32_t>("k_table", k_table, ScalarType::Int, 4 * in.Tk);
  in.kv_lo = queries, in.kv_hi = queries + in.Tq, in.q_bits = queries + 2 * in.Tq, in.q_modality = queries + 3 * in.Tq;
  in.q_lo = keys, in.q_hi = keys + in.Tk, in.k_bits = keys + 2 * in.Tk, in.k_modality = keys + 3 * in.Tk;
  in.has_visible = has_visible;
  in.scale = static_cast<float>(scale);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 3 && bias->size(0) == in.H, "attention: pair_bias must be [H, Mq, Mk]");
    in.Mq = bias->size(1), in.Mk = bias->size(2);
    in.bias = floats("pair_bias", *bias, bias->numel());
    check_modalities(in.q_modality, in.Tq, in.Mq);
    check_modalities(in.k_modality, in.Tk, in.Mk);
  }
  in.dropout = dropout_p > 0.0;
  if (in.dropout) {
    STD_TORCH_CHECK(rng.has_value(), "attention: dropout needs rng");
    const auto* words = data_of<int64_t>("rng", *rng, ScalarType::Long, 2);
    in.threshold = static_cast<uint32_t>(threshold);
    in.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
    in.seed[0] = static_cast<uint32_t>(words[0]);
    in.seed[1] = static_cast<uint32_t>(static_cast<uint64_t>(words[0]) >> 32);
    in.offset = static_cast<uint32_t>(words[1]);
  }
  return in;
}

void parallel(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
  if (n > 0) torch::stable::parallel_for(0, n, 1, body);
}

void attention_fwd(Tensor q, Tensor k, Tensor v, Optional bias, Optional rng, Tensor q_table, Tensor k_table,
                   Tensor tiles, Tensor spans, double scale, bool has_visible, double dropout_p, int64_t threshold,
                   Tensor out, Optional lse, Optional mass) {
  q = with_whole_heads("q", q), k = with_whole_heads("k", k), v = with_whole_heads("v", v);
  bias = side_by_side("pair_bias", bias);
  attention::Forward f{};
  f.in = inputs_of(q, k, v, bias, rng, q_table, k_table, scale, has_visible, dropout_p, threshold);
  f.tiles = ranges_of("tiles", tiles, 4, {f.in.Tq, spans.size(0)});
  f.spans = ranges_of("spans", spans, 3, {f.in.Tk});
  f.num_tiles = tiles.size(0);
  for (int64_t t = 0; t < f.num_tiles; ++t)
    f.tile_rows = std::max<int64_t>(f.tile_rows, f.tiles[4 * t + 1] - f.tiles[4 * t]);
  f.out = heads_of("out", out, q, f.in.Tq, f.in.H, f.in.D);
  if (lse) f.lse = floats("lse", *lse, f.in.H * f.in.Tq);
  if (mass) {
    f.in.Mk = mass->size(2);
    f.mass = floats("mass", *mass, f.in.Tq * f.in.H * f.in.Mk);
    check_modalities(f.in.k_modality, f.in.Tk, f.in.Mk);
    STD_TORCH_CHECK(!bias || bias->size(2) == f.in.Mk, "attention: mass and pair_bias differ in modalities");
  }
  attention::forward(f, parallel);
}

void attention_bwd(Tensor dout, Optional dlse, Tensor q, Tensor k, Tensor v, Optional bias, Optional rng, Tensor out,
                   Tensor lse, Tensor q_table, Tensor k_table, Tensor samples, double scale, bool has_visible,
                   double dropout_p, int64_t threshold, Tensor dq, Tensor dk, Tensor dv, Optional dbias) {
  q = with_whole_heads("q", q), k = with_whole_heads("k", k), v = with_whole_heads("v", v);
  dout = with_whole_heads("do", dout), out = with_whole_heads("out", out);
  bias = side_by_side("pair_bias", bias), dlse = side_by_side("dlse", dlse);
  attention::Backward b{};
  b.in = inputs_of(q, k, v, bias, rng, q_table, k_table, scale, has_visible, dropout_p, threshold);
  const Inputs& in = b.in;
  b.samples = ranges_of("samples", samples, 4, {in.Tq, in.Tk});
  b.num_samples = samples.size(0);
  b.out = heads_of("out", out, q, in.Tq, in.H, in.D);
  b.dout = heads_of("do", dout, q, in.Tq, in.H, in.D);
  b.dq = heads_of("dq", dq, q, in.Tq, in.H, in.D);
  b.dk = heads_of("dk", dk, q, in.Tk, in.G, in.D);
  b.dv = heads_of("dv", dv, q, in.Tk, in.G, in.D);
  b.lse = floats("lse", lse, in.H * in.Tq);
  if (dlse) b.dlse = floats("dlse", *dlse, in.H * in.Tq);
  if (dbias) {
    STD_TORCH_CHECK(in.bias != nullptr, "attention: dbias without pair_bias");
    b.dbias = floats("dbias", *dbias, in.H * in.Mq * in.Mk);
  }
  attention::backward(b, parallel);
}

int64_t attention_terms(Tensor like) { return attention::terms(dtype_of(like)); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mm_cpp, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
  m.impl("attention_terms", TORCH_BOX(&attention_terms));
}
