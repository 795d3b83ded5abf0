// attention on the CPU: queries four at a time against sixteen keys at a time, whose coordinates are transposed once.
#include "fused.h"

#include "../attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "isa.h"
#include "vector.h"

namespace clmfast {
namespace {

constexpr int64_t GROUP = 4;  // queries that share every load of a key

template <class T>
std::unique_ptr<T[]> scratch(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

constexpr int64_t round_up(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// The rows that a sequence's queries see, as keys 0, 1, ... : first those of the prefix, then its own.
struct Keys {
  int64_t prefix_begin, n_prefix, begin, n;

  int64_t row(int64_t key) const { return key < n_prefix ? prefix_begin + key : begin + key - n_prefix; }
};

template <class T>
int64_t row_of(const Attention<T>& op, int64_t query) {
  return op.query_row ? op.query_row[query] : query;
}

template <class T>
Keys keys_of(const Attention<T>& op, const Sequence& s) {
  const int64_t n_prefix = s.prefix_end - s.prefix_begin;
  return {s.prefix_begin, n_prefix, s.begin, n_prefix + row_of(op, s.query_end - 1) - s.begin + 1};
}

// The rows of one head, as the loops want them: by address, each padded with zeros to whole vectors.
template <class T>
class Rows {
 public:
  CLMFAST_BODY Rows(const T* from, int64_t stride, const Keys& keys, int64_t width) : row_(new const T*[keys.n]) {
    const int64_t padded = round_up(width);
    const bool is_whole = padded == width;
    if (!is_whole) copy_.reset(new T[keys.n * padded]());
    for (int64_t key = 0; key < keys.n; ++key) {
      row_[key] = from + keys.row(key) * stride;
      if (is_whole) continue;
      std::memcpy(&copy_[key * padded], row_[key], width * sizeof(T));
      row_[key] = &copy_[key * padded];
    }
  }
  CLMFAST_BODY const T* operator[](int64_t key) const { return row_[key]; }

 private:
  std::unique_ptr<const T*[]> row_;
  std::unique_ptr<T[]> copy_;
};

// to[w, key] = rows[key][w], w up to whole vectors; keys beyond the last are zeros.
template <class T>
CLMFAST_BODY void transpose(const Rows<T>& rows, int64_t n_keys, int64_t width, T* to) {
  const int64_t padded = round_up(n_keys);
  for (int64_t first = 0; first < n_keys; first += LANES) {
    for (int64_t w = 0; w < width; w += LANES) {
      Vector<T> square[LANES];
      for (int64_t i = 0; i < LANES; ++i)
        square[i] = first + i < n_keys ? load(rows[first + i] + w) : Vector<T>{};
      transpose_square<T>(square);
      for (int64_t i = 0; i < LANES; ++i) store(to + (w + i) * padded + first, square[i]);
    }
  }
}

// The next up to GROUP queries: where they are, how many keys each sees. Places that are left over repeat the last one.
template <class T>
struct Group {
  int64_t n, query[GROUP], n_seen[GROUP];

  CLMFAST_BODY Group(const Attention<T>& op, const Sequence& s, const Keys& keys, int64_t first)
      : n(std::min(GROUP, s.query_end - first)) {
    for (int64_t g = 0; g < GROUP; ++g) {
      query[g] = first + std::min(g, n - 1);
      n_seen[g] = keys.n_prefix + row_of(op, query[g]) - s.begin + 1;
    }
  }
};

// dot[g][lane] = sum_w a[g][w] b[w, lane]
template <class T>
CLMFAST_BODY void dots(const T* const* a, const T* b, int64_t b_stride, int64_t width, Vector<T>* dot) {
  Vector<T> sum[GROUP] = {};
  for (int64_t w = 0; w < width; ++w) {
    const Vector<T> column = load(b + w * b_stride);
    for (int64_t g = 0; g < GROUP; ++g) sum[g] += a[g][w] * column;
  }
  for (int64_t g = 0; g < GROUP; ++g) dot[g] = sum[g];
}

// x in the places first + lane < n, `other` in the rest
template <class T>
CLMFAST_BODY Vector<T> keep_first(Vector<T> x, int64_t first, int64_t n, T other) {
  const Vector<T> lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lane < static_cast<T>(n - first) ? x : other - Vector<T>{};
}

template <class T>
CLMFAST_BODY Vector<T> load_first(const T* from, int64_t n) {
  if (n >= LANES) return load(from);
  T all[LANES] = {};
  std::memcpy(all, from, n * sizeof(T));
  return load(all);
}

// The first n lanes of x, or all.
template <class T>
CLMFAST_BODY void store_first(T* to, Vector<T> x, int64_t n) {
  if (n >= LANES) return store(to, x);
  T all[LANES];
  store(all, x);
  std::memcpy(to, all, n * sizeof(T));
}

// to[g] = sum_{key < n_seen[g]} weight[g][key] rows[key]; weight [GROUP, weight_stride]
template <class T>
CLMFAST_BODY void weighted_sums(const Group<T>& group, const T* weight, int64_t weight_stride, const Rows<T>& rows,
                                int64_t width, T* const* to) {
  for (int64_t w = 0; w < width; w += LANES) {
    Vector<T> sum[GROUP] = {};
    for (int64_t key = 0; key < group.n_seen[0]; ++key) {
      const Vector<T> x = load(rows[key] + w);
      for (int64_t g = 0; g < GROUP; ++g) sum[g] += weight[g * weight_stride + key] * x;
    }
    for (int64_t g = 0; g < group.n; ++g) {  // keys that not all of the group see are not even multiplied by zero
      for (int64_t key = group.n_seen[0]; key < group.n_seen[g]; ++key)
        sum[g] += weight[g * weight_stride + key] * load(rows[key] + w);
      store_first(to[g] + w, sum[g], width - w);
    }
  }
}

// to[key] += sum_g weight[g][key] row[g] over those g that see the key; to [., round_up(width)]
template <class T>
CLMFAST_BODY void add_outer(const Group<T>& group, const T* weight, int64_t weight_stride, const T* const* row,
                            int64_t width, T* to) {
  const int64_t padded = round_up(width);
  for (int64_t w = 0; w < width; w += LANES) {
    Vector<T> x[GROUP];
    for (int64_t g = 0; g < GROUP; ++g) x[g] = g < group.n ? load_first(row[g] + w, width - w) : Vector<T>{};
    for (int64_t key = 0; key < group.n_seen[0]; ++key) {
      Vector<T> sum = load(to + key * padded + w);
      for (int64_t g = 0; g < group.n; ++g) sum += weight[g * weight_stride + key] * x[g];
      store(to + key * padded + w, sum);
    }
    for (int64_t g = 0; g < group.n; ++g) {
      for (int64_t key = group.n_seen[0]; key < group.n_seen[g]; ++key)
        store(to + key * padded + w, load(to + key * padded + w) + weight[g * weight_stride + key] * x[g]);
    }
  }
}

template <class T>
CLMFAST_BODY void forward_any(const Attention<T>& op, const Sequence& s, const AttentionOut<T>& to) {
  if (s.query_begin >= s.query_end) return;
  const Keys keys = keys_of(op, s);
  const int64_t W = op.width, H = op.n_heads, padded_keys = round_up(keys.n), padded_width = round_up(W);
  const T scale = 1 / std::sqrt(static_cast<T>(W)), lowest = -std::numeric_limits<T>::infinity();
  const auto key = scratch<T>(padded_width * padded_keys), weight = scratch<T>(GROUP * padded_keys);

  for (int64_t h = 0; h < H; ++h) {
    transpose(Rows<T>(op.k + h * W, op.kv_stride, keys, W), keys.n, W, key.get());
    const Rows<T> value(op.v + h * W, op.kv_stride, keys, W);
    for (int64_t first = s.query_begin; first < s.query_end; first += GROUP) {
      const Group<T> group(op, s, keys, first);
      const T* q[GROUP];
      T* out[GROUP];
      Vector<T> dot[GROUP];
      for (int64_t g = 0; g < GROUP; ++g) {
        q[g] = op.q + group.query[g] * op.q_stride + h * W;
        out[g] = to.out + group.query[g] * to.out_stride + h * W;
      }
      for (int64_t j = 0; j < group.n_seen[GROUP - 1]; j += LANES) {
        dots(q, key.get() + j, padded_keys, W, dot);
        for (int64_t g = 0; g < group.n; ++g) store(&weight[g * padded_keys + j], dot[g] * scale);
      }
      for (int64_t g = 0; g < group.n; ++g) {
        T* of = &weight[g * padded_keys];
        const int64_t n = group.n_seen[g];
        Vector<T> highest = lowest - Vector<T>{};
        for (int64_t j = 0; j < n; j += LANES) {
          const Vector<T> x = keep_first(load(of + j), j, n, lowest);
          store(of + j, x);
          highest = larger<T>(highest, x);
        }
        T top = largest_of<T>(highest);
        if (top == lowest) top = 0;
        Vector<T> sums = {};
        for (int64_t j = 0; j < n; j += LANES) {
          const Vector<T> p = exp_of(load(of + j) - top);
          store(of + j, p);
          sums += p;
        }
        const T sum = sum_of<T>(sums);
        for (int64_t j = 0; j < n; j += LANES) store(of + j, load(of + j) / sum);
        to.lse[group.query[g] * H + h] = top + std::log(sum);
      }
      weighted_sums(group, weight.get(), padded_keys, value, W, out);
    }
  }
}

template <class T>
CLMFAST_BODY void backward_any(const Attention<T>& op, const Sequence& s, const AttentionOut<const T>& forward,
                                const AttentionGrad<T>& grad) {
  if (s.query_begin >= s.query_end) return;
  const Keys keys = keys_of(op, s);
  const int64_t W = op.width, H = op.n_heads, padded_keys = round_up(keys.n), padded_width = round_up(W);
  const T scale = 1 / std::sqrt(static_cast<T>(W));
  const auto key = scratch<T>(padded_width * padded_keys), value = scratch<T>(padded_width * padded_keys);
  const auto grad_key = scratch<T>(keys.n * padded_width), grad_value = scratch<T>(keys.n * padded_width);
  const auto weight = scratch<T>(GROUP * padded_keys), grad_dot = scratch<T>(GROUP * padded_keys);

  for (int64_t h = 0; h < H; ++h) {
    const Rows<T> key_row(op.k + h * W, op.kv_stride, keys, W);
    transpose(key_row, keys.n, W, key.get());
    transpose(Rows<T>(op.v + h * W, op.kv_stride, keys, W), keys.n, W, value.get());
    std::fill_n(grad_key.get(), keys.n * padded_width, T(0));
    std::fill_n(grad_value.get(), keys.n * padded_width, T(0));
    for (int64_t first = s.query_begin; first < s.query_end; first += GROUP) {
      const Group<T> group(op, s, keys, first);
      const T *q[GROUP], *grad_out[GROUP];
      T *grad_q[GROUP], delta[GROUP], lse[GROUP];
      Vector<T> dot[GROUP], grad_weight[GROUP];
      for (int64_t g = 0; g < GROUP; ++g) {
        const int64_t query = group.query[g];
        q[g] = op.q + query * op.q_stride + h * W;
        grad_out[g] = grad.grad_out + query * grad.grad_out_stride + h * W;
        grad_q[g] = grad.grad_q + query * op.q_stride + h * W;
        const T* out = forward.out + query * forward.out_stride + h * W;
        Vector<T> products = {};
        for (int64_t w = 0; w < W; w += LANES) products += load_first(grad_out[g] + w, W - w) * load_first(out + w, W - w);
        delta[g] = sum_of<T>(products);
        lse[g] = forward.lse[query * H + h];
      }
      for (int64_t j = 0; j < group.n_seen[GROUP - 1]; j += LANES) {
        dots(q, key.get() + j, padded_keys, W, dot);
        dots(grad_out, value.get() + j, padded_keys, W, grad_weight);
        for (int64_t g = 0; g < group.n; ++g) {
          const int64_t n = group.n_seen[g];
          const Vector<T> p = keep_first(exp_of(dot[g] * scale - lse[g]), j, n, T(0));
          store(&weight[g * padded_keys + j], p);
          store(&grad_dot[g * padded_keys + j], keep_first(p * (grad_weight[g] - delta[g]) * scale, j, n, T(0)));
        }
      }
      weighted_sums(group, grad_dot.get(), padded_keys, key_row, W, grad_q);
      add_outer(group, grad_dot.get(), padded_keys, q, W, grad_key.get());
      add_outer(group, weight.get(), padded_keys, grad_out, W, grad_value.get());
    }
    for (int64_t r = 0; r < keys.n; ++r) {
      std::memcpy(grad.grad_k + (s.begin + r) * op.kv_stride + h * W, &grad_key[r * padded_width], W * sizeof(T));
      std::memcpy(grad.grad_v + (s.begin + r) * op.kv_stride + h * W, &grad_value[r * padded_width], W * sizeof(T));
    }
  }
}

// The bodies of both types, by names that CLMFAST_PER_ISA can extend.
#define CLMFAST_FORWARD_PARAMETERS(T) (const Attention<T>& op, const Sequence& s, const AttentionOut<T>& to)
#define CLMFAST_BACKWARD_PARAMETERS(T)                                                              \
  (const Attention<T>& op, const Sequence& s, const AttentionOut<const T>& out, const AttentionGrad<T>& grad)
#define CLMFAST_ATTENTION(T)                                                                        \
  CLMFAST_BODY void forward_##T##_body CLMFAST_FORWARD_PARAMETERS(T) { forward_any(op, s, to); }    \
  CLMFAST_BODY void backward_##T##_body CLMFAST_BACKWARD_PARAMETERS(T) { backward_any(op, s, out, grad); } \
  CLMFAST_PER_ISA(void, forward_##T, CLMFAST_FORWARD_PARAMETERS(T), (op, s, to))                    \
  CLMFAST_PER_ISA(void, backward_##T, CLMFAST_BACKWARD_PARAMETERS(T), (op, s, out, grad))

CLMFAST_ATTENTION(float)
CLMFAST_ATTENTION(double)

}  // namespace

void attention_cpu(const Attention<float>& op, const Sequence& s, const AttentionOut<float>& to) {
  forward_float(op, s, to);
}
void attention_cpu(const Attention<double>& op, const Sequence& s, const AttentionOut<double>& to) {
  forward_double(op, s, to);
}
void attention_backward_cpu(const Attention<float>& op, const Sequence& s, const AttentionOut<const float>& out,
                            const AttentionGrad<float>& grad) {
  backward_float(op, s, out, grad);
}
void attention_backward_cpu(const Attention<double>& op, const Sequence& s, const AttentionOut<const double>& out,
                            const AttentionGrad<double>& grad) {
  backward_double(op, s, out, grad);
}

}  // namespace clmfast
