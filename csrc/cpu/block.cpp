// The halves of a block on the CPU. A task takes some rows through the whole half while they are in the cache.
#include "fused.h"

#include "../block.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "gemm.h"
#include "isa.h"
#include "lanes.h"

namespace clmfast {
namespace {

constexpr int64_t GRAD_ROWS = 64, GRAD_COLUMNS = 128;  // the part of a weight whose gradient is one task
static_assert(PANEL == HIDDEN_PANEL);

int64_t n_tasks(int64_t n, int64_t per_task) { return (n + per_task - 1) / per_task; }

// n rows in an even number of tasks of the same size, at most ROWS, so that two threads end together. Sums over tasks
// are part of a result, so the number of threads does not matter. (Multiples of eight: slower, as every task reads all
// weights.)
class RowTasks {
 public:
  explicit RowTasks(int64_t n) : n_(n) {
    n_tasks_ = std::min(n, 2 * clmfast::n_tasks(n, 2 * ROWS));
  }

  int64_t n_tasks() const { return n_tasks_; }
  int64_t first(int64_t task) const { return task * n_ / n_tasks_; }
  int64_t n_rows(int64_t task) const { return first(task + 1) - first(task); }

 private:
  int64_t n_, n_tasks_;
};

// ---- pieces, each compiled for every instruction set

constexpr int SUMS = 16;  // partial sums of a row, in whatever registers: no sum depends on their width

// The partial sums in a fixed order.
template <int W>
CLMFAST_BODY float total_of(const Lanes<W>* sums) {
  float part[SUMS];
  for (int c = 0; c < SUMS / W; ++c) lanes<W>(part + c * W) = sums[c];
  for (int n = SUMS / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) part[i] += part[i + n];
  return part[0];
}

// normed = (x - mean) * rstd * weight + bias, one row after the other; mean and rstd are kept if asked for.
template <int W>
CLMFAST_BODY void norm_rows_body(const float* x, int64_t n_rows, int64_t D, const float* weight, const float* bias,
                                 float* normed, float* mean, float* rstd) {
  const int64_t whole = D / SUMS * SUMS;
  for (int64_t r = 0; r < n_rows; ++r, x += D, normed += D) {
    Lanes<W> sums[SUMS / W] = {}, squares[SUMS / W] = {};
    for (int64_t d = 0; d < whole; d += SUMS)
      for (int c = 0; c < SUMS / W; ++c) sums[c] += lanes<W>(x + d + c * W);
    float sum = total_of<W>(sums);
    for (int64_t d = whole; d < D; ++d) sum += x[d];
    const float m = sum / D;
    for (int64_t d = 0; d < whole; d += SUMS) {
      for (int c = 0; c < SUMS / W; ++c) {
        const Lanes<W> centred = lanes<W>(x + d + c * W) - m;
        squares[c] += centred * centred;
      }
    }
    float square = total_of<W>(squares);
    for (int64_t d = whole; d < D; ++d) square += (x[d] - m) * (x[d] - m);
    const float s = 1 / std::sqrt(square / D + EPSILON);
    for (int64_t d = 0; d < whole; d += W)
      lanes<W>(normed + d) = (lanes<W>(x + d) - m) * s * lanes<W>(weight + d) + lanes<W>(bias + d);
    for (int64_t d = whole; d < D; ++d) normed[d] = (x[d] - m) * s * weight[d] + bias[d];
    if (mean) {
      mean[r] = m;
      rstd[r] = s;
    }
  }
}

CLMFAST_PER_WIDTH(norm_rows,
                  (const float* x, int64_t n_rows, int64_t D, const float* weight, const float* bias, float* normed,
                   float* mean, float* rstd),
                  (x, n_rows, D, weight, bias, normed, mean, rstd))

// The gradient of norm_rows: grad_x = beside + d/dx, and the shares of these rows in the gradients of weight and bias
// are added. normed gets the values of the forward pass once more. beside may be grad_x.
template <int W>
CLMFAST_BODY void norm_rows_backward_body(const float* x, const float* mean, const float* rstd, int64_t n_rows,
                                          int64_t D, const float* weight, const float* bias, const float* grad,
                                          const float* beside, float* grad_x, float* normed, float* grad_weight,
                                          float* grad_bias) {
  const int64_t whole = D / SUMS * SUMS;
  for (int64_t r = 0; r < n_rows; ++r, x += D, grad += D, beside += D, grad_x += D, normed += D) {
    const float m = mean[r], s = rstd[r];
    Lanes<W> sums[SUMS / W] = {}, products[SUMS / W] = {};
    for (int64_t d = 0; d < whole; d += SUMS) {
      for (int c = 0; c < SUMS / W; ++c) {
        const Lanes<W> scaled = lanes<W>(grad + d + c * W) * lanes<W>(weight + d + c * W);
        sums[c] += scaled;
        products[c] += scaled * ((lanes<W>(x + d + c * W) - m) * s);
      }
    }
    float sum = total_of<W>(sums), product = total_of<W>(products);
    for (int64_t d = whole; d < D; ++d) {
      sum += grad[d] * weight[d];
      product += grad[d] * weight[d] * ((x[d] - m) * s);
    }
    sum /= D;
    product /= D;
    for (int64_t d = 0; d < whole; d += W) {
      const Lanes<W> unit = (lanes<W>(x + d) - m) * s, g = lanes<W>(grad + d), w = lanes<W>(weight + d);
      lanes<W>(grad_x + d) = lanes<W>(beside + d) + s * (g * w - sum - unit * product);
      lanes<W>(grad_weight + d) += g * unit;
      lanes<W>(grad_bias + d) += g;
      lanes<W>(normed + d) = unit * w + lanes<W>(bias + d);
    }
    for (int64_t d = whole; d < D; ++d) {
      const float unit = (x[d] - m) * s;
      grad_x[d] = beside[d] + s * (grad[d] * weight[d] - sum - unit * product);
      grad_weight[d] += grad[d] * unit;
      grad_bias[d] += grad[d];
      normed[d] = unit * weight[d] + bias[d];
    }
  }
}

CLMFAST_PER_WIDTH(norm_rows_backward,
                  (const float* x, const float* mean, const float* rstd, int64_t n_rows, int64_t D, const float* weight,
                   const float* bias, const float* grad, const float* beside, float* grad_x, float* normed,
                   float* grad_weight, float* grad_bias),
                  (x, mean, rstd, n_rows, D, weight, bias, grad, beside, grad_x, normed, grad_weight, grad_bias))

// vector.h's exp_of.
template <int W>
CLMFAST_BODY Lanes<W> exp_lanes(Lanes<W> x) {
  const float MAGIC = 12582912.0f;
  x = x < -87.0f ? Lanes<W>{} - 87.0f : x;
  x = x > 88.0f ? Lanes<W>{} + 88.0f : x;
  const Lanes<W> shifted = x * 1.44269504088896341f + MAGIC;
  const Lanes<W> n = shifted - MAGIC;
  const Lanes<W> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes<W> e = r * 1.9875691500e-4f + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  e = e * (r * r) + r + 1.0f;
  using Int = typename LanesOf<W>::Int;
  return e * reinterpret_cast<Lanes<W>>((reinterpret_cast<Int>(shifted) - 0x4B400000 + 127) << 23);
}

// z[i] -> gelu(z[i]), and gelu'(z[i]) into slope if asked for: with (1 + tanh(u)) / 2 = 1 / (1 + e^-2u).
template <int W>
CLMFAST_BODY void gelu_body(float* z, int64_t n, float* slope) {
  const float A = 0.7978845608028654f, B = 0.044715f;  // sqrt(2 / pi)
  float rest[2][W] = {};
  for (int64_t i = 0; i < n; i += W) {
    const bool is_whole = i + W <= n;
    if (!is_whole) std::memcpy(rest[0], z + i, (n - i) * sizeof(float));
    float *to = is_whole ? z + i : rest[0], *to_slope = is_whole ? slope + i : rest[1];
    const Lanes<W> x = lanes<W>(to), square = x * x;
    const Lanes<W> share = 1.0f / (1.0f + exp_lanes<W>(-2 * A * x * (1.0f + B * square)));
    const Lanes<W> y = x * share;
    lanes<W>(to) = y;
    if (slope) lanes<W>(to_slope) = share + y * (1.0f - share) * (2 * A * (1.0f + 3 * B * square));
    if (is_whole) continue;
    std::memcpy(z + i, rest[0], (n - i) * sizeof(float));
    if (slope) std::memcpy(slope + i, rest[1], (n - i) * sizeof(float));
  }
}

CLMFAST_PER_WIDTH(gelu, (float* z, int64_t n, float* slope), (z, n, slope))

CLMFAST_BODY void add_body(const float* a, const float* b, int64_t n, float* sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] = a[i] + b[i];
}

CLMFAST_PER_ISA(void, add, (const float* a, const float* b, int64_t n, float* sum), (a, b, n, sum))

CLMFAST_BODY void scale_by_body(float* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] *= from[i];
}

CLMFAST_PER_ISA(void, scale_by, (float* to, const float* from, int64_t n), (to, from, n))

// ---- what both halves share

// W [n_out, n_in] as the right factor of x W^T, and of g W.
Panels forward_panels(const float* weight, int64_t n_out, int64_t n_in) {
  return Panels(weight, n_in, n_out, 1, n_in);
}
Panels backward_panels(const float* weight, int64_t n_out, int64_t n_in) {
  return Panels(weight, n_out, n_in, n_in, 1);
}

void pack(ParallelFor parallel_for, Panels& a, Panels& b) {
  for_each(parallel_for, a.n_panels() + b.n_panels(), [&](int64_t i) {
    if (i < a.n_panels())
      a.pack(i);
    else
      b.pack(i - a.n_panels());
  });
}

// The gradient of a weight [n_out, n_in] and its bias: from grad [n, n_out] and input [n, n_in].
struct WeightGrad {
  const Columns &grad, &input;
  float *weight, *bias;

  int64_t n_tasks() const { return clmfast::n_tasks(grad.N(), GRAD_ROWS) * n_parts(); }
  int64_t n_parts() const { return clmfast::n_tasks(input.N(), GRAD_COLUMNS); }
  void run(int64_t task) const {
    const int64_t row = task / n_parts() * GRAD_ROWS, n_rows = std::min(GRAD_ROWS, grad.N() - row);
    const int64_t column = task % n_parts() * GRAD_COLUMNS, n_columns = std::min(GRAD_COLUMNS, input.N() - column);
    multiply_transposed(grad, input, row, n_rows, column, n_columns, weight);
    if (column == 0) column_sums(grad, row, n_rows, bias + row);
  }
};

template <size_t N>
void weight_grads(ParallelFor parallel_for, const WeightGrad (&parts)[N]) {
  int64_t n_tasks = 0;
  for (const WeightGrad& part : parts) n_tasks += part.n_tasks();
  for_each(parallel_for, n_tasks, [&](int64_t task) {
    const WeightGrad* part = parts;
    for (; task >= part->n_tasks(); ++part) task -= part->n_tasks();
    part->run(task);
  });
}

// Columns that live as long as one call.
class Scratch : public Columns {
 public:
  Scratch(int64_t T, int64_t N) : Scratch(T, N, new float[size(T, N)]) {}

 private:
  Scratch(int64_t T, int64_t N, float* panels) : Columns(panels, T, N), owner_(panels) {}
  std::unique_ptr<float[]> owner_;
};

// Shares of the norm's gradients by task, added up in the order of tasks.
class NormGrads {
 public:
  NormGrads(int64_t n_tasks, int64_t D) : n_tasks_(n_tasks), D_(D), parts_(n_tasks * 2 * D) {}

  float* weight(int64_t task) { return &parts_[task * 2 * D_]; }
  float* bias(int64_t task) { return &parts_[(task * 2 + 1) * D_]; }
  void sum(const BlockGrads& to) {
    column_sums(parts_.data(), 2 * D_, n_tasks_, D_, to.norm_weight);
    column_sums(parts_.data() + D_, 2 * D_, n_tasks_, D_, to.norm_bias);
  }

 private:
  int64_t n_tasks_, D_;
  std::vector<float> parts_;
};

std::unique_ptr<float[]> scratch(int64_t n) { return std::unique_ptr<float[]>(new float[n]); }

}  // namespace

// ---- mlp

void mlp_block_cpu(const MlpBlock& op, float* y, const MlpSaved& saved, ParallelFor parallel_for) {
  const BlockWeights& w = op.weights;
  const int64_t D = w.D, F = w.F;
  Panels in = forward_panels(w.in_weight, F, D), out = forward_panels(w.out_weight, D, F);
  pack(parallel_for, in, out);
  const RowTasks rows(op.n);
  for_each(parallel_for, rows.n_tasks(), [&](int64_t task) {
    const int64_t first = rows.first(task), n = rows.n_rows(task);
    const float* x = op.x + first * D;
    float* to = y + first * D;
    auto normed = scratch(n * D), hidden = scratch(n * F);
    norm_rows(x, n, D, w.norm_weight, w.norm_bias, normed.get(), saved.mean ? saved.mean + first : nullptr,
              saved.rstd ? saved.rstd + first : nullptr);
    multiply(normed.get(), D, n, in, {w.in_bias}, hidden.get(), F);
    gelu(hidden.get(), n * F, saved.slope ? saved.slope + first * F : nullptr);
    if (saved.hidden) Columns(saved.hidden, op.n, F).put(first, n, hidden.get(), F);
    for (int64_t r = 0; r < n; ++r) add(x + r * D, w.out_bias, D, to + r * D);
    multiply(hidden.get(), F, n, out, {to, D}, to, D);
  });
}

void mlp_block_backward_cpu(const MlpBlock& op, const MlpSaved& saved, const float* grad_y, float* grad_x,
                            const BlockGrads& grads, ParallelFor parallel_for) {
  const BlockWeights& w = op.weights;
  const int64_t D = w.D, F = w.F;
  const RowTasks rows(op.n);
  Panels in = backward_panels(w.in_weight, F, D), out = backward_panels(w.out_weight, D, F);
  pack(parallel_for, in, out);
  Scratch normed_columns(op.n, D), grad_z_columns(op.n, F), grad_y_columns(op.n, D);
  NormGrads norm_grads(rows.n_tasks(), D);
  for_each(parallel_for, rows.n_tasks(), [&](int64_t task) {
    const int64_t first = rows.first(task), n = rows.n_rows(task);
    auto grad_z = scratch(n * F), grad_normed = scratch(n * D), normed = scratch(n * D);
    multiply(grad_y + first * D, D, n, out, {}, grad_z.get(), F);
    scale_by(grad_z.get(), saved.slope + first * F, n * F);
    multiply(grad_z.get(), F, n, in, {}, grad_normed.get(), D);
    norm_rows_backward(op.x + first * D, saved.mean + first, saved.rstd + first, n, D, w.norm_weight, w.norm_bias,
                       grad_normed.get(), grad_y + first * D, grad_x + first * D, normed.get(),
                       norm_grads.weight(task), norm_grads.bias(task));
    normed_columns.put(first, n, normed.get(), D);
    grad_z_columns.put(first, n, grad_z.get(), F);
    grad_y_columns.put(first, n, grad_y + first * D, D);
  });
  norm_grads.sum(grads);
  const Columns hidden(saved.hidden, saved.n_hidden, F);
  weight_grads(parallel_for, {{grad_y_columns, hidden, grads.out_weight, grads.out_bias},
                              {grad_z_columns, normed_columns, grads.in_weight, grads.in_bias}});
}

// ---- attention

namespace {

// Consecutive sequences, as many as fill ROWS rows of output, and at least one.
struct Chunk {
  int64_t first, last;  // sequences [first, last)
};

class Sequences {
 public:
  explicit Sequences(const AttentionBlock& op) : op_(op), query_begin_(op.n_sequences + 1) {
    for (int64_t b = 0; b <= op.n_sequences; ++b)
      query_begin_[b] = op.kept ? std::lower_bound(op.kept, op.kept + op.R, op.offset[b]) - op.kept : op.offset[b];
    for (int64_t b = 0; b < op.n_sequences; ++b) {
      if (chunks_.empty() || query_begin_[b + 1] - query_begin_[chunks_.back().first] > ROWS) chunks_.push_back({b, b});
      chunks_.back().last = b + 1;
    }
  }

  const std::vector<Chunk>& chunks() const { return chunks_; }
  int64_t query_begin(int64_t b) const { return query_begin_[b]; }
  Sequence at(int64_t b) const {
    Sequence s{op_.offset[b], query_begin_[b], query_begin_[b + 1]};
    if (op_.prefix && op_.prefix[b] >= 0) {
      s.prefix_begin = op_.offset[op_.prefix[b]];
      s.prefix_end = op_.offset[op_.prefix[b] + 1];
    }
    return s;
  }

 private:
  const AttentionBlock& op_;
  std::vector<int64_t> query_begin_;
  std::vector<Chunk> chunks_;
};

// The rows of x that the kept tokens are.
struct Asking {
  bool is_all = true;        // every row, in order: `row` is empty
  std::vector<int64_t> row;  // [R], ascending

  explicit Asking(const AttentionBlock& op) {
    if (!op.kept) return;
    is_all = op.R == op.n;
    for (int64_t i = 0; i < op.R; ++i) {
      row.push_back(op.source ? op.source[op.kept[i]] : op.kept[i]);
      is_all = is_all && row.back() == i;
    }
    if (is_all) row.clear();
  }
  int64_t operator[](int64_t i) const { return is_all ? i : row[i]; }
};

// Keys and values by token: those of the rows where each token is its own row, else copies.
class TokenKv {
 public:
  TokenKv(const AttentionBlock& op, const float* kv)
      : op_(op), kv_(kv), copies_(op.source ? new float[op.n_tokens * 2 * op.weights.D] : nullptr) {}

  void prepare(const Chunk& chunk) {
    const int64_t size = 2 * op_.weights.D;
    for (int64_t i = op_.offset[chunk.first]; op_.source && i < op_.offset[chunk.last]; ++i)
      std::memcpy(&copies_[i * size], kv_ + op_.source[i] * size, size * sizeof(float));
  }
  Attention<float> attention(const float* q) const {
    const int64_t D = op_.weights.D;
    const float* kv = op_.source ? copies_.get() : kv_;
    return {q, kv, kv + D, D, 2 * D, op_.kept, op_.n_heads, D / op_.n_heads};
  }

 private:
  const AttentionBlock& op_;
  const float* kv_;
  std::unique_ptr<float[]> copies_;
};

// The tokens of each row, ascending.
class TokensOfRow {
 public:
  explicit TokensOfRow(const AttentionBlock& op)
      : begin_(op.source ? op.n + 2 : 0), token_(op.source ? op.n_tokens : 0) {
    if (!op.source) return;
    for (int64_t i = 0; i < op.n_tokens; ++i) ++begin_[op.source[i] + 2];
    for (int64_t r = 2; r <= op.n + 1; ++r) begin_[r] += begin_[r - 1];
    for (int64_t i = 0; i < op.n_tokens; ++i) token_[begin_[op.source[i] + 1]++] = i;
  }

  // to[r] = sum of from[i] over the tokens i of row first + r, `size` numbers each.
  void sum(const float* from, int64_t size, int64_t first, int64_t n, float* to) const {
    std::memset(to, 0, n * size * sizeof(float));
    for (int64_t r = 0; r < n; ++r)
      for (int64_t i = begin_[first + r]; i < begin_[first + r + 1]; ++i)
        add(to + r * size, from + token_[i] * size, size, to + r * size);
  }

 private:
  std::vector<int64_t> begin_, token_;
};

}  // namespace

void attention_block_cpu(const AttentionBlock& op, float* y, const AttentionSaved& saved, ParallelFor parallel_for) {
  const BlockWeights& w = op.weights;
  const int64_t D = w.D;
  const RowTasks rows(op.n), asking_rows(op.R);
  Panels in_q = forward_panels(w.in_weight, D, D), in_kv = forward_panels(w.in_weight + D * D, 2 * D, D);
  Panels out = forward_panels(w.out_weight, D, D);
  const Sequences sequences(op);
  const Asking asking(op);
  pack(parallel_for, in_q, in_kv);
  // The output's panels are packed beside the first products.
  const int64_t n_asking_tasks = asking.is_all ? 0 : asking_rows.n_tasks();
  for_each(parallel_for, rows.n_tasks() + n_asking_tasks + out.n_panels(), [&](int64_t task) {
    if (task < rows.n_tasks()) {
      const int64_t first = rows.first(task), n = rows.n_rows(task);
      auto normed = scratch(n * D);
      norm_rows(op.x + first * D, n, D, w.norm_weight, w.norm_bias, normed.get(),
                saved.mean ? saved.mean + first : nullptr, saved.rstd ? saved.rstd + first : nullptr);
      multiply(normed.get(), D, n, in_kv, {w.in_bias + D}, saved.kv + first * 2 * D, 2 * D);
      if (asking.is_all) multiply(normed.get(), D, n, in_q, {w.in_bias}, saved.q + first * D, D);
    } else if ((task -= rows.n_tasks()) < out.n_panels()) {
      out.pack(task);
    } else {
      task -= out.n_panels();
      const int64_t first = asking_rows.first(task), n = asking_rows.n_rows(task);
      auto normed = scratch(n * D);
      for (int64_t i = 0; i < n; ++i)
        std::memcpy(&normed[i * D], op.x + asking[first + i] * D, D * sizeof(float));
      norm_rows(normed.get(), n, D, w.norm_weight, w.norm_bias, normed.get(), nullptr, nullptr);
      multiply(normed.get(), D, n, in_q, {w.in_bias}, saved.q + first * D, D);
    }
  });
  TokenKv kv(op, saved.kv);
  const Attention<float> attention = kv.attention(saved.q);
  for_each(parallel_for, sequences.chunks().size(), [&](int64_t task) {
    const Chunk& chunk = sequences.chunks()[task];
    kv.prepare(chunk);
    for (int64_t b = chunk.first; b < chunk.last; ++b)
      attention_cpu(attention, sequences.at(b), {saved.mixed, D, saved.lse});
    const int64_t first = sequences.query_begin(chunk.first), n = sequences.query_begin(chunk.last) - first;
    float* to = y + first * D;
    for (int64_t i = 0; i < n; ++i) add(op.x + asking[first + i] * D, w.out_bias, D, to + i * D);
    multiply(saved.mixed + first * D, D, n, out, {to, D}, to, D);
  });
}

void attention_block_backward_cpu(const AttentionBlock& op, const AttentionSaved& saved, const float* grad_y,
                                  float* grad_x, const BlockGrads& grads, ParallelFor parallel_for) {
  const BlockWeights& w = op.weights;
  const int64_t D = w.D;
  const RowTasks rows(op.n);
  Panels in_q = backward_panels(w.in_weight, D, D), in_kv = backward_panels(w.in_weight + D * D, 2 * D, D);
  Panels out = backward_panels(w.out_weight, D, D);
  const Sequences sequences(op);
  const Asking asking(op);
  const TokensOfRow tokens(op);
  Scratch normed_columns(op.n, D), asking_normed_columns(asking.is_all ? 0 : op.R, D), mixed_columns(op.R, D);
  Scratch grad_y_columns(op.R, D), grad_q_columns(op.R, D), grad_kv_columns(op.n, 2 * D);
  auto grad_mixed = scratch(op.R * D), grad_q = scratch(op.R * D), grad_kv = scratch(op.n_tokens * 2 * D);
  pack(parallel_for, out, in_kv);
  TokenKv kv(op, saved.kv);
  const Attention<float> attention = kv.attention(saved.q);
  for_each(parallel_for, sequences.chunks().size() + in_q.n_panels(), [&](int64_t task) {
    if (task < in_q.n_panels()) return in_q.pack(task);
    const Chunk& chunk = sequences.chunks()[task - in_q.n_panels()];
    kv.prepare(chunk);
    if (op.kept) {  // not every token has a query behind it
      const int64_t begin = op.offset[chunk.first], end = op.offset[chunk.last];
      std::memset(&grad_kv[begin * 2 * D], 0, (end - begin) * 2 * D * sizeof(float));
    }
    const int64_t first = sequences.query_begin(chunk.first), n = sequences.query_begin(chunk.last) - first;
    multiply(grad_y + first * D, D, n, out, {}, &grad_mixed[first * D], D);
    grad_y_columns.put(first, n, grad_y + first * D, D);
    for (int64_t b = chunk.first; b < chunk.last; ++b)
      attention_backward_cpu(attention, sequences.at(b), {saved.mixed, D, saved.lse},
                             {grad_mixed.get(), D, grad_q.get(), grad_kv.get(), grad_kv.get() + D});
    mixed_columns.put(first, n, saved.mixed + first * D, D);
    grad_q_columns.put(first, n, &grad_q[first * D], D);
  });
  NormGrads norm_grads(rows.n_tasks(), D);
  for_each(parallel_for, rows.n_tasks(), [&](int64_t task) {
    const int64_t first = rows.first(task), n = rows.n_rows(task);
    auto grad_normed = scratch(n * D), normed = scratch(n * D);
    float* to = grad_x + first * D;
    const float* beside = grad_y + first * D;
    auto sums = scratch(op.source ? n * 2 * D : 0);
    if (op.source) tokens.sum(grad_kv.get(), 2 * D, first, n, sums.get());
    const float* from_kv = op.source ? sums.get() : &grad_kv[first * 2 * D];
    multiply(from_kv, 2 * D, n, in_kv, {}, grad_normed.get(), D);
    grad_kv_columns.put(first, n, from_kv, 2 * D);
    int64_t i_first = 0, n_asking = 0;
    if (asking.is_all) {
      multiply(&grad_q[first * D], D, n, in_q, {grad_normed.get(), D}, grad_normed.get(), D);
    } else {
      const auto begin = std::lower_bound(asking.row.begin(), asking.row.end(), first);
      i_first = begin - asking.row.begin();
      n_asking = std::lower_bound(begin, asking.row.end(), first + n) - begin;
      auto from_q = scratch(n_asking * D);
      multiply(&grad_q[i_first * D], D, n_asking, in_q, {}, from_q.get(), D);
      std::memset(to, 0, n * D * sizeof(float));
      beside = to;
      for (int64_t i = 0; i < n_asking; ++i) {
        const int64_t at = (asking[i_first + i] - first) * D;
        add(&grad_normed[at], &from_q[i * D], D, &grad_normed[at]);
        std::memcpy(to + at, grad_y + (i_first + i) * D, D * sizeof(float));
      }
    }
    norm_rows_backward(op.x + first * D, saved.mean + first, saved.rstd + first, n, D, w.norm_weight, w.norm_bias,
                       grad_normed.get(), beside, to, normed.get(), norm_grads.weight(task), norm_grads.bias(task));
    normed_columns.put(first, n, normed.get(), D);
    for (int64_t i = i_first; i < i_first + n_asking; ++i)
      asking_normed_columns.put(i, 1, &normed[(asking[i] - first) * D], D);
  });
  norm_grads.sum(grads);
  const Columns& into_q = asking.is_all ? normed_columns : asking_normed_columns;
  weight_grads(parallel_for,
               {{grad_kv_columns, normed_columns, grads.in_weight + D * D, grads.in_bias + D},
                {grad_q_columns, into_q, grads.in_weight, grads.in_bias},
                {grad_y_columns, mixed_columns, grads.out_weight, grads.out_bias}});
}

}  // namespace clmfast
