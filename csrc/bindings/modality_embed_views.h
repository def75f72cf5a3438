// modality_embed on the CPU, of memory that exists: checks all that is read and written, and computes.
// T tokens, E width, M modalities
#pragma once

#include <optional>
#include <vector>

#include "bindings/view.h"
#include "cpu/modality_embed.h"

namespace mm::bindings {

// What both directions read, in the order of the operator's schema.
struct EmbedArguments {
  std::vector<View> streams;  // [M]
  View modality;
  std::optional<View> token;
  std::vector<View> tables;
  std::vector<int64_t> table_counts;           // [M]
  std::optional<View> norm_weight, norm_bias;  // fp32
  View modality_ids, source_rows, positions;
  std::optional<View> rng;
  int64_t norm = 0;
  double eps = 0, dropout_p = 0;
};

bool holds_ids(const View& stream);
// What the float streams that have rows promote to, else the parameters' dtype.
torch::headeronly::ScalarType result_type(const EmbedArguments& arguments);
bool has_mean(int64_t norm);
bool has_rstd(int64_t norm);

// mean, rstd: fp32 [T], null where the norm has none.
void write_embed(const EmbedArguments& arguments, const View& out, float* mean, float* rstd);

// Gradients in the order of `needs`: streams, modality, token, tables, norm weight, norm bias; those of parameters are
// summed in fp32.   Nothing is written where a view has no shape, and without a norm no stream of floats is read.
void write_embed_backward(const EmbedArguments& arguments, const View& grad_out, const std::optional<View>& mean,
                          const std::optional<View>& rstd, const std::vector<View>& gradients);

}  // namespace mm::bindings
