// attention on the CPU: a head of a sequence as small matrices, multiplied in register tiles of four rows by two
// vectors, only where the queries see the keys. Queries go in blocks, so that long sequences stay within the cache.
#include "fused.h"

#include "../attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "isa.h"
#include "vector.h"

namespace clmfast {
namespace {

constexpr int64_t ROWS = 4;      // of a register tile: with two vectors it keeps both multipliers busy
constexpr int64_t QUERIES = 32;  // of a block
constexpr int64_t LINE = 64;     // bytes that memory moves as one

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Pieces of one allocation, each on a line of its own.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : all_(static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(LINE)))), next_(all_) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { ::operator delete(all_, std::align_val_t(LINE)); }

  static constexpr int64_t size(int64_t n) { return round_up(n, LINE / sizeof(T)); }
  T* take(int64_t n) {
    T* piece = next_;
    next_ += size(n);
    return piece;
  }

 private:
  T *all_, *next_;
};

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

// Up to QUERIES queries: query `first` + i sees the keys below n_seen[i], which ascends.
struct Block {
  int64_t first, n, n_seen[QUERIES];

  template <class T>
  Block(const Attention<T>& op, const Sequence& s, const Keys& keys, int64_t first)
      : first(first), n(std::min(QUERIES, s.query_end - first)) {
    for (int64_t i = 0; i < n; ++i) n_seen[i] = keys.n_prefix + row_of(op, first + i) - s.begin + 1;
  }
  int64_t n_keys() const { return n_seen[n - 1]; }
};

struct Span {
  int64_t begin, end;
};

// A matrix by its elements: [i, j] at at[i row + j column].
template <class T>
struct Matrix {
  T* at;
  int64_t row, column = 1;
};

// Everything that depends on the width of a vector, which is a register of the instruction set.
template <class T, int64_t BYTES>
struct Tiles {
  static constexpr int64_t N = BYTES / sizeof(T), PANEL = 2 * N;
  typedef T Lanes __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
  typedef T Four __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
  typedef int32_t Whole __attribute__((vector_size(N * sizeof(int32_t)), aligned(4), may_alias));

  CLMFAST_BODY static Lanes get(const T* from) { return *reinterpret_cast<const Lanes*>(from); }
  CLMFAST_BODY static void put(T* to, Lanes x) { *reinterpret_cast<Lanes*>(to) = x; }

  CLMFAST_BODY static Lanes exponential(Lanes x) {
    if constexpr (sizeof(T) == sizeof(float)) return exp_of<Lanes, Whole>(x);
    else {
      Lanes e = {};
      for (int64_t i = 0; i < N; ++i) e[i] = std::exp(x[i]);
      return e;
    }
  }

  // x in the lanes below n, `other` in the rest
  CLMFAST_BODY static Lanes keep_first(Lanes x, int64_t n, T other) {
    Lanes lane = {};
    for (int64_t i = 0; i < N; ++i) lane[i] = i;
    return lane < static_cast<T>(n) ? x : other - Lanes{};
  }

  CLMFAST_BODY static T sum_of(Lanes x) {
    T lane[N], sum = 0;
    std::memcpy(lane, &x, sizeof x);
    for (int64_t step = N / 2; step; step /= 2)
      for (int64_t i = 0; i < step; ++i) lane[i] += lane[i + step];
    return sum + lane[0];
  }

  CLMFAST_BODY static T largest_of(Lanes x) {
    T lane[N];
    std::memcpy(lane, &x, sizeof x);
    for (int64_t step = N / 2; step; step /= 2)
      for (int64_t i = 0; i < step; ++i) lane[i] = lane[i] > lane[i + step] ? lane[i] : lane[i + step];
    return lane[0];
  }

  // The same row of the next head is wanted soon: heads lie side by side, their rows too far apart for the processor to
  // foresee. (Behind the last head this asks for memory that may not be ours, which a prefetch may.)
  CLMFAST_BODY static void prefetch_next(const T* row, int64_t width) {
    for (int64_t w = 0; w < width; w += LINE / sizeof(T)) __builtin_prefetch(row + width + w);
  }

  // `to` [padded] = the row, zeros behind its width
  CLMFAST_BODY static void copy_row(const T* from, int64_t width, int64_t padded, T* to) {
    prefetch_next(from, width);
    int64_t w = 0;
    for (; w + N <= width; w += N) put(to + w, get(from + w));
    for (; w < width; ++w) to[w] = from[w];
    for (; w < padded; ++w) to[w] = 0;
  }

  CLMFAST_BODY static void gather(const T* from, int64_t stride, const Keys& keys, int64_t width, int64_t padded, T* to) {
    for (int64_t key = 0; key < keys.n; ++key) copy_row(from + keys.row(key) * stride, width, padded, to + key * padded);
  }

  // The keys of `rows` [n, padded] side by side, PANEL to a panel: key j's coordinate w at
  // to[(j - j % PANEL) padded + w PANEL + j % PANEL]. The last vector is filled up with the last key.
  CLMFAST_BODY static void transpose(const T* rows, int64_t n, int64_t padded, T* to) {
    for (int64_t key = 0; key < round_up(n, N); key += 4) {
      const T* row[4];
      for (int64_t i = 0; i < 4; ++i) row[i] = rows + std::min(key + i, n - 1) * padded;
      T* column = to + key / PANEL * PANEL * padded + key % PANEL;
      for (int64_t w = 0; w < padded; w += 4) {
        Four x[4];
        for (int64_t i = 0; i < 4; ++i) x[i] = *reinterpret_cast<const Four*>(row[i] + w);
        const Four a = __builtin_shufflevector(x[0], x[2], 0, 4, 1, 5), b = __builtin_shufflevector(x[0], x[2], 2, 6, 3, 7);
        const Four c = __builtin_shufflevector(x[1], x[3], 0, 4, 1, 5), d = __builtin_shufflevector(x[1], x[3], 2, 6, 3, 7);
        Four* const at[4] = {reinterpret_cast<Four*>(column + w * PANEL), reinterpret_cast<Four*>(column + (w + 1) * PANEL),
                             reinterpret_cast<Four*>(column + (w + 2) * PANEL),
                             reinterpret_cast<Four*>(column + (w + 3) * PANEL)};
        *at[0] = __builtin_shufflevector(a, c, 0, 4, 1, 5);
        *at[1] = __builtin_shufflevector(a, c, 2, 6, 3, 7);
        *at[2] = __builtin_shufflevector(b, d, 0, 4, 1, 5);
        *at[3] = __builtin_shufflevector(b, d, 2, 6, 3, 7);
      }
    }
  }

  // sum[r][c] += sum_{k in span} a[r][k a_step] b[k, c]
  template <int64_t C>
  CLMFAST_BODY static void add_products(const T* const* a, int64_t a_step, const T* b, int64_t b_step, Span span,
                                        Lanes (&sum)[ROWS][C]) {
    Lanes s[ROWS][C];
    for (int64_t r = 0; r < ROWS; ++r)
      for (int64_t c = 0; c < C; ++c) s[r][c] = sum[r][c];
    const T *a0 = a[0] + span.begin * a_step, *a1 = a[1] + span.begin * a_step, *a2 = a[2] + span.begin * a_step,
            *a3 = a[3] + span.begin * a_step;
    b += span.begin * b_step;
    for (int64_t k = span.begin; k < span.end; ++k, b += b_step) {
      Lanes x[C];
      for (int64_t c = 0; c < C; ++c) x[c] = get(b + c * N);
      for (int64_t c = 0; c < C; ++c) s[0][c] += *a0 * x[c];
      for (int64_t c = 0; c < C; ++c) s[1][c] += *a1 * x[c];
      for (int64_t c = 0; c < C; ++c) s[2][c] += *a2 * x[c];
      for (int64_t c = 0; c < C; ++c) s[3][c] += *a3 * x[c];
      a0 += a_step, a1 += a_step, a2 += a_step, a3 += a_step;
    }
    for (int64_t r = 0; r < ROWS; ++r)
      for (int64_t c = 0; c < C; ++c) sum[r][c] = s[r][c];
  }

  template <int64_t C>
  CLMFAST_BODY static void score_tile(const T* const* a, const T* b, int64_t width, T* const* to) {
    Lanes sum[ROWS][C] = {};
    add_products<C>(a, 1, b, PANEL, {0, width}, sum);
    for (int64_t r = 0; r < ROWS; ++r)
      for (int64_t c = 0; c < C; ++c) put(to[r] + c * N, sum[r][c]);
  }

  // to[i, key] = a[i] . key for the keys that query i sees, and rubbish in up to a tile's worth behind them
  CLMFAST_BODY static void scores(const T* a, int64_t padded, int64_t width, const Block& block, const T* keys, T* to,
                                  int64_t to_stride) {
    for (int64_t j = 0; j < block.n_keys(); j += PANEL) {
      for (int64_t first = 0; first < block.n; first += ROWS) {
        const int64_t n = block.n_seen[std::min(first + ROWS, block.n) - 1] - j;
        if (n <= 0) continue;
        const T* row[ROWS];
        T* out[ROWS];
        for (int64_t r = 0; r < ROWS; ++r) {
          const int64_t i = std::min(first + r, block.n - 1);
          row[r] = a + i * padded;
          out[r] = to + i * to_stride + j;
        }
        if (n > N) score_tile<2>(row, keys + j * padded, width, out);
        else score_tile<1>(row, keys + j * padded, width, out);
      }
    }
  }

  CLMFAST_BODY static Lanes get_first(const T* from, int64_t n) {
    if (n >= N) return get(from);
    T all[N] = {};
    std::memcpy(all, from, n * sizeof(T));
    return get(all);
  }

  CLMFAST_BODY static void put_first(T* to, Lanes x, int64_t n) {
    if (n >= N) return put(to, x);
    T all[N];
    put(all, x);
    std::memcpy(to, all, n * sizeof(T));
  }

  template <int64_t C>
  CLMFAST_BODY static void mix_tile(const T* const* a, int64_t a_step, const T* b, int64_t b_step, const Span* span,
                                    T* const* to, int64_t n_real, int64_t n_added, int64_t width) {
    Span some = span[0], all = span[0];
    for (int64_t r = 1; r < ROWS; ++r) {
      some = {std::min(some.begin, span[r].begin), std::max(some.end, span[r].end)};
      all = {std::max(all.begin, span[r].begin), std::min(all.end, span[r].end)};
    }
    Lanes sum[ROWS][C] = {};
    add_products<C>(a, a_step, b, b_step, all, sum);
    // What not all rows of the tile see is not even multiplied by zero for the others.
    for (int64_t k = some.begin; k < some.end; k = k + 1 == all.begin ? all.end : k + 1) {
      if (k == all.begin) k = all.end;
      if (k >= some.end) break;
      for (int64_t r = 0; r < ROWS; ++r)
        if (span[r].begin <= k && k < span[r].end)
          for (int64_t c = 0; c < C; ++c) sum[r][c] += a[r][k * a_step] * get(b + k * b_step + c * N);
    }
    for (int64_t r = 0; r < ROWS; ++r) {
      if (r >= n_real) break;
      for (int64_t c = 0; c < C; ++c) {
        if (r < n_added) sum[r][c] += get_first(to[r] + c * N, width - c * N);
        put_first(to[r] + c * N, sum[r][c], width - c * N);
      }
    }
  }

  // to[i] = sum_{k in span[i]} a[i, k] b[k], on top of what is there for i < n_added
  CLMFAST_BODY static void mix(Matrix<const T> a, int64_t n, const Span* span, const T* b, int64_t padded, int64_t width,
                               Matrix<T> to, int64_t n_added) {
    for (int64_t first = 0; first < n; first += ROWS) {
      const T* row[ROWS];
      T* out[ROWS];
      Span spans[ROWS];
      for (int64_t r = 0; r < ROWS; ++r) {
        const int64_t i = std::min(first + r, n - 1);
        row[r] = a.at + i * a.row, out[r] = to.at + i * to.row, spans[r] = span[i];
      }
      for (int64_t w = 0; w < padded; w += PANEL) {
        if (padded - w > N) mix_tile<2>(row, a.column, b + w, padded, spans, out, n - first, n_added - first, width - w);
        else mix_tile<1>(row, a.column, b + w, padded, spans, out, n - first, n_added - first, width - w);
        for (int64_t r = 0; r < ROWS; ++r) out[r] += PANEL;
      }
    }
  }

  // A row of scores becomes its softmax; returns lse.
  CLMFAST_BODY static T soften(T* row, int64_t n, T scale) {
    const T lowest = -std::numeric_limits<T>::infinity();
    Lanes highest = lowest - Lanes{}, sums = {};
    for (int64_t j = 0; j < n; j += N) {
      const Lanes x = keep_first(get(row + j) * scale, n - j, lowest);
      put(row + j, x);
      highest = highest > x ? highest : x;
    }
    T top = largest_of(highest);
    if (top == lowest) top = 0;
    for (int64_t j = 0; j < n; j += N) {
      const Lanes p = exponential(get(row + j) - top);
      put(row + j, p);
      sums += p;
    }
    const T sum = sum_of(sums), share = 1 / sum;
    for (int64_t j = 0; j < n; j += N) put(row + j, get(row + j) * share);
    return top + std::log(sum);
  }

  CLMFAST_BODY static void forward(const Attention<T>& op, const Sequence& s, const AttentionOut<T>& to) {
    if (s.query_begin >= s.query_end) return;
    const Keys keys = keys_of(op, s);
    const int64_t W = op.width, H = op.n_heads, padded = round_up(W, N);
    const int64_t n_packed = round_up(keys.n, PANEL), stride = n_packed + LINE / sizeof(T);  // no two rows in one cache set
    const T scale = 1 / std::sqrt(static_cast<T>(W));
    using S = Scratch<T>;
    S scratch(2 * S::size(n_packed * padded) + S::size(QUERIES * padded) + S::size(QUERIES * stride));
    T *packed = scratch.take(n_packed * padded), *rows = scratch.take(n_packed * padded);
    T *q = scratch.take(QUERIES * padded), *weight = scratch.take(QUERIES * stride);

    for (int64_t h = 0; h < H; ++h) {
      gather(op.k + h * W, op.kv_stride, keys, W, padded, rows);
      transpose(rows, keys.n, padded, packed);
      gather(op.v + h * W, op.kv_stride, keys, W, padded, rows);
      for (int64_t first = s.query_begin; first < s.query_end; first += QUERIES) {
        const Block block(op, s, keys, first);
        Span span[QUERIES];
        for (int64_t i = 0; i < block.n; ++i) {
          copy_row(op.q + (first + i) * op.q_stride + h * W, W, padded, q + i * padded);
          span[i] = {0, block.n_seen[i]};
        }
        scores(q, padded, W, block, packed, weight, stride);
        for (int64_t i = 0; i < block.n; ++i)
          to.lse[(first + i) * H + h] = soften(weight + i * stride, block.n_seen[i], scale);
        mix({weight, stride}, block.n, span, rows, padded, W, {to.out + first * to.out_stride + h * W, to.out_stride}, 0);
      }
    }
  }

  CLMFAST_BODY static void backward(const Attention<T>& op, const Sequence& s, const AttentionOut<const T>& forward,
                                    const AttentionGrad<T>& grad) {
    if (s.query_begin >= s.query_end) return;
    const Keys keys = keys_of(op, s);
    const int64_t W = op.width, H = op.n_heads, padded = round_up(W, N);
    const int64_t n_packed = round_up(keys.n, PANEL), stride = n_packed + LINE / sizeof(T);
    const T scale = 1 / std::sqrt(static_cast<T>(W));
    using S = Scratch<T>;
    S scratch(3 * S::size(n_packed * padded) + 2 * S::size(QUERIES * padded) + 2 * S::size(QUERIES * stride));
    T *key = scratch.take(n_packed * padded), *value = scratch.take(n_packed * padded);
    T *rows = scratch.take(n_packed * padded), *q = scratch.take(QUERIES * padded);
    T *grad_out = scratch.take(QUERIES * padded), *weight = scratch.take(QUERIES * stride);
    T* grad_score = scratch.take(QUERIES * stride);
    const std::unique_ptr<Span[]> sees(new Span[keys.n]);

    for (int64_t h = 0; h < H; ++h) {
      gather(op.v + h * W, op.kv_stride, keys, W, padded, rows);
      transpose(rows, keys.n, padded, value);
      gather(op.k + h * W, op.kv_stride, keys, W, padded, rows);
      transpose(rows, keys.n, padded, key);
      int64_t n_known = 0;  // keys that have a gradient by now
      for (int64_t first = s.query_begin; first < s.query_end; first += QUERIES) {
        const Block block(op, s, keys, first);
        Span span[QUERIES];
        for (int64_t i = 0, seen = 0; i < block.n; ++i) {
          copy_row(op.q + (first + i) * op.q_stride + h * W, W, padded, q + i * padded);
          copy_row(grad.grad_out + (first + i) * grad.grad_out_stride + h * W, W, padded, grad_out + i * padded);
          span[i] = {0, block.n_seen[i]};
          for (; seen < block.n_seen[i]; ++seen) sees[seen] = {i, block.n};
        }
        scores(q, padded, W, block, key, weight, stride);
        scores(grad_out, padded, W, block, value, grad_score, stride);
        for (int64_t i = 0; i < block.n; ++i) {
          const T* out = forward.out + (first + i) * forward.out_stride + h * W;
          const T lse = forward.lse[(first + i) * H + h];
          T *p_row = weight + i * stride, *grad_row = grad_score + i * stride;
          prefetch_next(out, W);
          Lanes products = {};
          for (int64_t w = 0; w < W; w += N) products += get(grad_out + i * padded + w) * get_first(out + w, W - w);
          const T delta = sum_of(products);
          for (int64_t j = 0; j < block.n_seen[i]; j += N) {
            const Lanes p = exponential(get(p_row + j) * scale - lse);
            put(p_row + j, p);
            put(grad_row + j, p * (get(grad_row + j) - delta) * scale);
          }
        }
        mix({grad_score, stride}, block.n, span, rows, padded, W, {grad.grad_q + first * op.q_stride + h * W, op.q_stride}, 0);
        T *grad_k = grad.grad_k + s.begin * op.kv_stride + h * W, *grad_v = grad.grad_v + s.begin * op.kv_stride + h * W;
        mix({grad_score, 1, stride}, block.n_keys(), sees.get(), q, padded, W, {grad_k, op.kv_stride}, n_known);
        mix({weight, 1, stride}, block.n_keys(), sees.get(), grad_out, padded, W, {grad_v, op.kv_stride}, n_known);
        n_known = block.n_keys();
      }
    }
  }
};

// Both passes with the registers of every instruction set.
#define CLMFAST_ATTENTION(T, isa, target, bytes)                                                                      \
  target void forward_##T##_##isa(const Attention<T>& op, const Sequence& s, const AttentionOut<T>& to) {             \
    Tiles<T, bytes>::forward(op, s, to);                                                                              \
  }                                                                                                                   \
  target void backward_##T##_##isa(const Attention<T>& op, const Sequence& s, const AttentionOut<const T>& forward,   \
                                   const AttentionGrad<T>& grad) {                                                    \
    Tiles<T, bytes>::backward(op, s, forward, grad);                                                                  \
  }

CLMFAST_ATTENTION(float, baseline, , 16)
CLMFAST_ATTENTION(float, avx2, CLMFAST_AVX2, 32)
CLMFAST_ATTENTION(float, avx512, CLMFAST_AVX512, 64)
CLMFAST_ATTENTION(double, baseline, , 32)  // two registers: a vector has four lanes or more
CLMFAST_ATTENTION(double, avx2, CLMFAST_AVX2, 32)
CLMFAST_ATTENTION(double, avx512, CLMFAST_AVX512, 64)

}  // namespace

void attention_cpu(const Attention<float>& op, const Sequence& s, const AttentionOut<float>& to) {
  static const auto forward = pick(forward_float_baseline, forward_float_avx2, forward_float_avx512);
  forward(op, s, to);
}
void attention_cpu(const Attention<double>& op, const Sequence& s, const AttentionOut<double>& to) {
  static const auto forward = pick(forward_double_baseline, forward_double_avx2, forward_double_avx512);
  forward(op, s, to);
}
void attention_backward_cpu(const Attention<float>& op, const Sequence& s, const AttentionOut<const float>& out,
                            const AttentionGrad<float>& grad) {
  static const auto backward = pick(backward_float_baseline, backward_float_avx2, backward_float_avx512);
  backward(op, s, out, grad);
}
void attention_backward_cpu(const Attention<double>& op, const Sequence& s, const AttentionOut<const double>& out,
                            const AttentionGrad<double>& grad) {
  static const auto backward = pick(backward_double_baseline, backward_double_avx2, backward_double_avx512);
  backward(op, s, out, grad);
}

}  // namespace clmfast
