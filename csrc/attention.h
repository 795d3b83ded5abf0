// attention: causal attention of sequences of any lengths, and its gradient.
//
//     out[i, h] = sum_{r in keys(i)} softmax_r( q[i, h] . k[r, h] / sqrt(W) ) v[r, h]
//     lse[i, h] = log sum_{r in keys(i)} exp( q[i, h] . k[r, h] / sqrt(W) )
//
//   q    row i at q + i q_stride, k and v row r at k + r kv_stride; [H, W] inside; float32 or float64
//   out  row i at out + i out_stride; lse [., H]
//
// A sequence owns keys from row `begin` on and the queries i in [query_begin, query_end); query i stands at row
// query_row[i] (null: at row i) and sees the rows [begin, query_row[i]] and, before them, the whole of
// [prefix_begin, prefix_end). Rows that no query sees are never read. Queries of a sequence ascend.
#pragma once

#include <cstdint>

namespace clmfast {

struct Sequence {
  int64_t begin, query_begin, query_end;
  int64_t prefix_begin = 0, prefix_end = 0;
};

template <class T>
struct Attention {
  const T *q, *k, *v;
  int64_t q_stride, kv_stride;
  const int64_t* query_row;
  int64_t n_heads, width;
};

template <class T>
struct AttentionOut {
  T* out;
  int64_t out_stride;
  T* lse;
};

// One sequence, all heads, in the calling thread.
void attention_cpu(const Attention<float>& op, const Sequence& sequence, const AttentionOut<float>& to);
void attention_cpu(const Attention<double>& op, const Sequence& sequence, const AttentionOut<double>& to);

// Gradients with the strides of what they belong to. Rows of grad_k and grad_v up to the last query's are written,
// rows behind it are left as they are; a prefix is not supported.
template <class T>
struct AttentionGrad {
  const T* grad_out;
  int64_t grad_out_stride;
  T *grad_q, *grad_k, *grad_v;
};

void attention_backward_cpu(const Attention<float>& op, const Sequence& sequence,
                            const AttentionOut<const float>& forward, const AttentionGrad<float>& grad);
void attention_backward_cpu(const Attention<double>& op, const Sequence& sequence,
                            const AttentionOut<const double>& forward, const AttentionGrad<double>& grad);

}  // namespace clmfast
