// The two halves of a pre-norm Transformer block, each with its normalisation, its bias and its residual, as one
// operation on packed tokens (float32), and their gradients.
//
//     mlp_block        y = x + W_out gelu(W_in norm(x) + b_in) + b_out
//     attention_block  y = x + W_out attention(W_qkv norm(x) + b_qkv) + b_out
//     norm(x) = (x - mean) / sqrt(variance + EPSILON) * norm_weight + norm_bias        over the D of a row
//     gelu(z) = z / 2 (1 + tanh( sqrt(2 / pi) (z + 0.044715 z^3) ))
//
// x [n, D] holds the tokens of all sequences back to back; weights are [out, in]; the rows of W_qkv are q, k, v, each
// [H, D / H]. Every value is a function of its row, its sequence and the weights alone; gradients of weights are sums
// in the order of rows. No thread count shows in a result.
#pragma once

#include <cstdint>

#include "attention.h"
#include "parallel.h"

namespace clmfast {

constexpr float EPSILON = 1e-5f;
constexpr int64_t HIDDEN_PANEL = 16;

// Weights of either half. D is the width of the stream, F that of what lies between: 3 D for attention.
struct BlockWeights {
  int64_t D, F;
  const float *norm_weight, *norm_bias;  // [D]
  const float *in_weight, *in_bias;      // [F, D], [F]
  const float *out_weight, *out_bias;    // mlp [D, F], attention [D, D]; [D]
};

struct BlockGrads {
  float *norm_weight, *norm_bias, *in_weight, *in_bias, *out_weight, *out_bias;
};

struct MlpBlock {
  BlockWeights weights;
  int64_t n;
  const float* x;
};

// What the gradient needs of the forward pass; all null where none is wanted.
struct MlpSaved {
  float *mean, *rstd;  // [n]
  float* hidden;       // [., n_hidden, HIDDEN_PANEL] gelu(z), HIDDEN_PANEL columns side by side; zeros beyond F
  float *slope;        // [n, F] gelu'(z)
  int64_t n_hidden;    // n; more where a backward pass takes the first rows of a forward one alone
};

void mlp_block_cpu(const MlpBlock& op, float* y, const MlpSaved& saved, ParallelFor parallel_for);

void mlp_block_backward_cpu(const MlpBlock& op, const MlpSaved& saved, const float* grad_y, float* grad_x,
                            const BlockGrads& grads, ParallelFor parallel_for);

// kept [R]: ascending tokens that are wanted (null: all); y [R, D] holds these alone. Every token's key and value is
// computed, but only the kept ones' queries and outputs.
// source [n_tokens]: the row of x that a token is (null: token i is row i, n = n_tokens): sequences that begin alike can
// share rows. source[kept] ascends strictly. Not together with prefix.
struct AttentionBlock {
  BlockWeights weights;
  int64_t n, n_tokens, R, n_heads, n_sequences;
  const float* x;
  const int64_t* kept;
  const int64_t* offset;  // [n_sequences + 1]: sequence b is the tokens offset[b] to offset[b + 1]
  const int64_t* prefix;  // [n_sequences] or null: the sequence whose tokens stand before those of b, -1 for none
  const int64_t* source;
};

struct AttentionSaved {
  float *mean, *rstd;  // [n], null where no gradient is wanted
  float* q;            // [R, D]
  float* kv;           // [n, 2, D]
  float* mixed;        // [R, D] what the heads put out
  float* lse;          // [R, H]
};

void attention_block_cpu(const AttentionBlock& op, float* y, const AttentionSaved& saved, ParallelFor parallel_for);

void attention_block_backward_cpu(const AttentionBlock& op, const AttentionSaved& saved, const float* grad_y,
                                  float* grad_x, const BlockGrads& grads, ParallelFor parallel_for);

}  // namespace clmfast
