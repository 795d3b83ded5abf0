// attention on the CPU: a head of a sequence as small matrices, multiplied in register tiles of four rows by two
// vectors, only where the queries see the keys. Queries go in blocks, so that long sequences stay within the cache.
#include "fused.h"

#include "../attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include "isa.h"
#include "vector.h"

namespace clmfast {
namespace {

constexpr int64_t ROWS = 4;      // of a register tile: with two vectors it keeps both multipliers busy
constexpr int64_t QUERIES = 32;  // of a block
constexpr int64_t FEW = 16;      // rows that are read where they stand, again and again
constexpr int64_t MANY = std::numeric_limits<int64_t>::max();  // the same, where they are read once
constexpr int64_t LINE = 64;     // bytes that memory moves as one

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Pieces of one allocation, each on a line of its own.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : all_(static_cast<char*>(::operator new(bytes, std::align_val_t(LINE)))), next_(all_) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { ::operator delete(all_, std::align_val_t(LINE)); }

  template <class T>
  static constexpr int64_t size(int64_t n) {
    return round_up(n * sizeof(T), LINE);
  }
  template <class T>
  T* take(int64_t n) {
    char* piece = next_;
    next_ += size<T>(n);
    return reinterpret_cast<T*>(piece);
  }

 private:
  char *all_, *next_;
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
  int64_t first, n, n_keys, n_seen[QUERIES];

  template <class T>
  Block(const Attention<T>& op, const Sequence& s, const Keys& keys, int64_t first)
      : first(first), n(std::min(QUERIES, s.query_end - first)), n_keys(0) {
    for (int64_t i = 0; i < n; ++i) n_seen[i] = n_keys = keys.n_prefix + row_of(op, first + i) - s.begin + 1;
    for (int64_t i = n; i < round_up(n, 2 * ROWS); ++i) n_seen[i] = n_keys;
  }
  int64_t at(int64_t i) const { return std::min(i, n - 1); }  // a tile is filled up with the last query
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
  typedef T Eight __attribute__((vector_size(8 * sizeof(T)), aligned(sizeof(T)), may_alias));
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

  template <int64_t I>
  CLMFAST_BODY static Four four(Lanes x) {
    return __builtin_shufflevector(x, x, 4 * I, 4 * I + 1, 4 * I + 2, 4 * I + 3);
  }

  CLMFAST_BODY static Four larger(Four x, Four y) { return x > y ? x : y; }

  CLMFAST_BODY static Four folded_sum(Lanes x) {
    if constexpr (N == 4) return four<0>(x);
    else if constexpr (N == 8) return four<0>(x) + four<1>(x);
    else return (four<0>(x) + four<2>(x)) + (four<1>(x) + four<3>(x));
  }

  CLMFAST_BODY static Four folded_largest(Lanes x) {
    if constexpr (N == 4) return four<0>(x);
    else if constexpr (N == 8) return larger(four<0>(x), four<1>(x));
    else return larger(larger(four<0>(x), four<2>(x)), larger(four<1>(x), four<3>(x)));
  }

  // The sums of four vectors' lanes, all four at once.
  CLMFAST_BODY static Four sums_of(const Lanes (&x)[ROWS]) {
    const Four a = folded_sum(x[0]), b = folded_sum(x[1]), c = folded_sum(x[2]), d = folded_sum(x[3]);
    const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  }

  CLMFAST_BODY static Four largest_of(const Lanes (&x)[ROWS]) {
    const Four a = folded_largest(x[0]), b = folded_largest(x[1]), c = folded_largest(x[2]), d = folded_largest(x[3]);
    const Four ab = larger(__builtin_shufflevector(a, b, 0, 4, 1, 5), __builtin_shufflevector(a, b, 2, 6, 3, 7));
    const Four cd = larger(__builtin_shufflevector(c, d, 0, 4, 1, 5), __builtin_shufflevector(c, d, 2, 6, 3, 7));
    return larger(__builtin_shufflevector(ab, cd, 0, 1, 4, 5), __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
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

  struct Rows {
    const T* at;
    int64_t stride;
  };

  // A head of the keys' rows, `padded` numbers each that may be read: the rows themselves where they are few, one after
  // another and fill their vectors, else copies in `to`. (Many rows a power of two apart share too few cache sets.)
  CLMFAST_BODY static Rows gather(const T* from, int64_t stride, const Keys& keys, int64_t width, int64_t padded,
                                  T* to, int64_t most = FEW) {
    if (keys.n_prefix == 0 && keys.n <= most && width == padded) {
      from += keys.begin * stride;
      for (int64_t key = 0; key < keys.n; ++key) prefetch_next(from + key * stride, width);
      return {from, stride};
    }
    for (int64_t key = 0; key < keys.n; ++key)
      copy_row(from + keys.row(key) * stride, width, padded, to + key * padded);
    return {to, padded};
  }

  // In every four lanes: two of x and two of y in turns, begun at the third if HIGH.
  template <bool HIGH, int... I>
  CLMFAST_BODY static Lanes in_turns(Lanes x, Lanes y, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(x, y, (I / 4 * 4 + 2 * HIGH + I % 4 / 2 + I % 2 * static_cast<int>(N))...);
  }

  CLMFAST_BODY static Four four_at(const T* from) { return *reinterpret_cast<const Four*>(from); }
  CLMFAST_BODY static Eight eight_at(const T* x, const T* y) {
    return __builtin_shufflevector(four_at(x), four_at(y), 0, 1, 2, 3, 4, 5, 6, 7);
  }

  // Four numbers of each row, one after another.
  CLMFAST_BODY static Lanes side_by_side(const T* const (&row)[N / 4], int64_t w) {
    if constexpr (N == 4) return four_at(row[0] + w);
    else if constexpr (N == 8) return eight_at(row[0] + w, row[1] + w);
    else
      return __builtin_shufflevector(eight_at(row[0] + w, row[1] + w), eight_at(row[2] + w, row[3] + w), 0, 1, 2, 3, 4,
                                     5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }

  // The keys of `rows` [n, padded] side by side, PANEL to a panel: key j's coordinate w at
  // to[(j - j % PANEL) padded + w PANEL + j % PANEL]. The last vector is filled up with the last key.
  CLMFAST_BODY static void transpose(Rows rows, int64_t n, int64_t padded, T* to) {
    constexpr auto EACH = std::make_integer_sequence<int, N>();
    for (int64_t key = 0; key < n; key += N) {
      const T* row[4][N / 4];  // [i]: every fourth one from i on
      for (int64_t i = 0; i < N; ++i) row[i % 4][i / 4] = rows.at + std::min(key + i, n - 1) * rows.stride;
      T* column = to + key / PANEL * PANEL * padded + key % PANEL;
      for (int64_t w = 0; w < padded; w += 4, column += 4 * PANEL) {
        const Lanes x0 = side_by_side(row[0], w), x1 = side_by_side(row[1], w), x2 = side_by_side(row[2], w),
                    x3 = side_by_side(row[3], w);
        const Lanes a = in_turns<false>(x0, x2, EACH), b = in_turns<true>(x0, x2, EACH);
        const Lanes c = in_turns<false>(x1, x3, EACH), d = in_turns<true>(x1, x3, EACH);
        put(column, in_turns<false>(a, c, EACH));
        put(column + PANEL, in_turns<true>(a, c, EACH));
        put(column + 2 * PANEL, in_turns<false>(b, d, EACH));
        put(column + 3 * PANEL, in_turns<true>(b, d, EACH));
      }
    }
  }

  // sum[r][c] += sum_{k in span} a[r][k a_step] b[k, c]
  template <int64_t R, int64_t C>
  CLMFAST_BODY static void add_products(const T* const* a, int64_t a_step, const T* b, int64_t b_step, Span span,
                                        Lanes (&sum)[R][C]) {
    Lanes s[R][C];
    const T* at[R];
    for (int64_t r = 0; r < R; ++r) {
      at[r] = a[r] + span.begin * a_step;
      for (int64_t c = 0; c < C; ++c) s[r][c] = sum[r][c];
    }
    b += span.begin * b_step;
    for (int64_t k = span.begin; k < span.end; ++k, b += b_step) {
      Lanes x[C];
      for (int64_t c = 0; c < C; ++c) x[c] = get(b + c * N);
      for (int64_t r = 0; r < R; ++r, at[r - 1] += a_step)
        for (int64_t c = 0; c < C; ++c) s[r][c] += *at[r] * x[c];
    }
    for (int64_t r = 0; r < R; ++r)
      for (int64_t c = 0; c < C; ++c) sum[r][c] = s[r][c];
  }

  template <int64_t R, int64_t C>
  CLMFAST_BODY static void score_tile(Rows a, int64_t width, const Block& block, int64_t first,
                                      const T* b, T* to, int64_t to_stride) {
    const T* row[R];
    for (int64_t r = 0; r < R; ++r) row[r] = a.at + block.at(first + r) * a.stride;
    Lanes sum[R][C] = {};
    add_products<R, C>(row, 1, b, PANEL, {0, width}, sum);
    for (int64_t r = 0; r < R; ++r)
      for (int64_t c = 0; c < C; ++c) put(to + (first + r) * to_stride + c * N, sum[r][c]);
  }

  // to[i, key] = a[i] . key for the keys that query i sees, and rubbish in up to a tile's worth behind them. Where one
  // vector is all that they see, eight queries: four sums alone would wait for each other.
  CLMFAST_BODY static void scores(Rows a, int64_t padded, int64_t width, const Block& block, const T* keys, T* to,
                                  int64_t to_stride) {
    for (int64_t j = 0; j < block.n_keys; j += PANEL, to += PANEL) {
      const T* b = keys + j * padded;
      for (int64_t first = 0; first < block.n; first += 2 * ROWS) {
        const int64_t n = block.n_seen[first + 2 * ROWS - 1] - j;
        if (n <= 0) continue;
        if (n <= N) {
          score_tile<2 * ROWS, 1>(a, width, block, first, b, to, to_stride);
          continue;
        }
        for (int64_t i = first; i < std::min(first + 2 * ROWS, block.n); i += ROWS) {
          if (block.n_seen[i + ROWS - 1] - j > N) score_tile<ROWS, 2>(a, width, block, i, b, to, to_stride);
          else if (block.n_seen[i + ROWS - 1] > j) score_tile<ROWS, 1>(a, width, block, i, b, to, to_stride);
        }
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

  template <int64_t R, int64_t C>
  CLMFAST_BODY static void mix_tile(const T* const* a, int64_t a_step, const T* b, int64_t b_step, const Span* span,
                                    T* const* to, int64_t n_real, int64_t n_added, int64_t width) {
    Span all = span[0];
    for (int64_t r = 1; r < R; ++r) all = {std::max(all.begin, span[r].begin), std::min(all.end, span[r].end)};
    Lanes sum[R][C] = {};
    add_products<R, C>(a, a_step, b, b_step, all, sum);
    // What not all rows of the tile see is not even multiplied by zero for the others.
#pragma GCC unroll 4  // a loop over rows would keep the sums in memory
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t k = span[r].begin; k < all.begin; ++k)
        for (int64_t c = 0; c < C; ++c) sum[r][c] += a[r][k * a_step] * get(b + k * b_step + c * N);
      for (int64_t k = all.end; k < span[r].end; ++k)
        for (int64_t c = 0; c < C; ++c) sum[r][c] += a[r][k * a_step] * get(b + k * b_step + c * N);
    }
    for (int64_t r = 0; r < R; ++r) {
      if (r >= n_real) break;
      for (int64_t c = 0; c < C; ++c) {
        if (r < n_added) sum[r][c] += get_first(to[r] + c * N, width - c * N);
        put_first(to[r] + c * N, sum[r][c], width - c * N);
      }
    }
  }

  template <int64_t R, int64_t C>
  CLMFAST_BODY static void mix_tiles(Matrix<const T> a, int64_t n, const Span* span, Rows b, int64_t width,
                                     Matrix<T> to, int64_t n_added) {
    for (int64_t first = 0; first < n; first += R) {
      const T* row[R];
      T* out[R];
      Span spans[R];
      for (int64_t r = 0; r < R; ++r) {
        const int64_t i = std::min(first + r, n - 1);
        row[r] = a.at + i * a.row, out[r] = to.at + i * to.row, spans[r] = span[i];
      }
      mix_tile<R, C>(row, a.column, b.at, b.stride, spans, out, n - first, n_added - first, width);
    }
  }

  // to[i] = sum_{k in span[i]} a[i, k] b[k], on top of what is there for i < n_added; neighbouring spans share a k.
  // Where a row is wide enough, tiles are of two rows, of which less is seen by one row alone.
  CLMFAST_BODY static void mix(Matrix<const T> a, int64_t n, const Span* span, Rows b, int64_t padded, int64_t width,
                               Matrix<T> to, int64_t n_added) {
    int64_t w = 0;
    for (; w + 4 * N <= padded; w += 4 * N)
      mix_tiles<2, 4>(a, n, span, {b.at + w, b.stride}, width - w, {to.at + w, to.row}, n_added);
    for (; w + 2 * N <= padded; w += 2 * N)
      mix_tiles<4, 2>(a, n, span, {b.at + w, b.stride}, width - w, {to.at + w, to.row}, n_added);
    if (w < padded) mix_tiles<4, 1>(a, n, span, {b.at + w, b.stride}, width - w, {to.at + w, to.row}, n_added);
  }

  // The scores of ROWS queries, row r at row + r stride, become softmax; returns lse. Row r has n[r] keys, no row more
  // than the last. Four rows at a time: their chains of sums and powers run side by side.
  CLMFAST_BODY static Four soften(T* row, int64_t stride, const int64_t* n, T scale) {
    const T lowest = -std::numeric_limits<T>::infinity();
    Lanes highest[ROWS], sums[ROWS] = {};
    for (int64_t r = 0; r < ROWS; ++r) highest[r] = lowest - Lanes{};
    for (int64_t j = 0; j < n[ROWS - 1]; j += N)
      for (int64_t r = 0; r < ROWS; ++r) {
        const Lanes x = keep_first(get(row + r * stride + j) * scale, n[r] - j, lowest);
        put(row + r * stride + j, x);
        highest[r] = highest[r] > x ? highest[r] : x;
      }
    Four top = largest_of(highest);
    top = top == lowest ? Four{} : top;
    for (int64_t j = 0; j < n[ROWS - 1]; j += N)
      for (int64_t r = 0; r < ROWS; ++r) {
        const Lanes p = keep_first(exponential(get(row + r * stride + j) - top[r]), n[r] - j, 0);
        put(row + r * stride + j, p);
        sums[r] += p;
      }
    const Four sum = sums_of(sums), share = 1 / sum;
    for (int64_t j = 0; j < n[ROWS - 1]; j += N)
      for (int64_t r = 0; r < ROWS; ++r) put(row + r * stride + j, get(row + r * stride + j) * share[r]);
    for (int64_t r = 0; r < ROWS; ++r) top[r] += std::log(sum[r]);
    return top;
  }

  CLMFAST_BODY static void forward(const Attention<T>& op, const Sequence& s, const AttentionOut<T>& to) {
    if (s.query_begin >= s.query_end) return;
    const Keys keys = keys_of(op, s);
    const int64_t W = op.width, H = op.n_heads, padded = round_up(W, N);
    const int64_t n_packed = round_up(keys.n, PANEL);
    const int64_t stride = n_packed + LINE / sizeof(T);  // no two rows in one cache set
    const T scale = 1 / std::sqrt(static_cast<T>(W));
    const int64_t n_rows = n_packed * padded, n_queries = QUERIES * padded, n_scores = QUERIES * stride;
    Scratch scratch(2 * Scratch::size<T>(n_rows) + Scratch::size<T>(n_queries) + Scratch::size<T>(n_scores));
    T *packed = scratch.take<T>(n_rows), *row_copies = scratch.take<T>(n_rows);
    T *q_copies = scratch.take<T>(n_queries), *weight = scratch.take<T>(n_scores);

    for (int64_t h = 0; h < H; ++h) {
      transpose(gather(op.k + h * W, op.kv_stride, keys, W, padded, row_copies, MANY), keys.n, padded, packed);
      const Rows v = gather(op.v + h * W, op.kv_stride, keys, W, padded, row_copies);
      for (int64_t first = s.query_begin; first < s.query_end; first += QUERIES) {
        const Block block(op, s, keys, first);
        Span span[QUERIES];
        for (int64_t i = 0; i < block.n; ++i) span[i] = {0, block.n_seen[i]};
        const Rows q = gather(op.q + h * W, op.q_stride, {0, 0, first, block.n}, W, padded, q_copies);
        scores(q, padded, W, block, packed, weight, stride);
        for (int64_t i = 0; i < block.n; i += ROWS) {
          const Four lse = soften(weight + i * stride, stride, block.n_seen + i, scale);
          for (int64_t r = 0; r < std::min(ROWS, block.n - i); ++r) to.lse[(first + i + r) * H + h] = lse[r];
        }
        mix({weight, stride}, block.n, span, v, padded, W, {to.out + first * to.out_stride + h * W, to.out_stride}, 0);
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
    const int64_t n_rows = n_packed * padded, n_queries = QUERIES * padded, n_scores = QUERIES * stride;
    Scratch scratch(3 * Scratch::size<T>(n_rows) + 2 * Scratch::size<T>(n_queries) + 2 * Scratch::size<T>(n_scores) +
                    Scratch::size<Span>(keys.n));
    T *key = scratch.take<T>(n_rows), *value = scratch.take<T>(n_rows), *row_copies = scratch.take<T>(n_rows);
    T *q_copies = scratch.take<T>(n_queries), *grad_copies = scratch.take<T>(n_queries);
    T *weight = scratch.take<T>(n_scores), *grad_score = scratch.take<T>(n_scores);
    Span* sees = scratch.take<Span>(keys.n);

    for (int64_t h = 0; h < H; ++h) {
      transpose(gather(op.v + h * W, op.kv_stride, keys, W, padded, row_copies, MANY), keys.n, padded, value);
      const Rows k = gather(op.k + h * W, op.kv_stride, keys, W, padded, row_copies);
      transpose(k, keys.n, padded, key);
      int64_t n_known = 0;  // keys that have a gradient by now
      for (int64_t first = s.query_begin; first < s.query_end; first += QUERIES) {
        const Block block(op, s, keys, first);
        Span span[QUERIES];
        for (int64_t i = 0, seen = 0; i < block.n; ++i) {
          span[i] = {0, block.n_seen[i]};
          for (; seen < block.n_seen[i]; ++seen) sees[seen] = {i, block.n};
        }
        const Keys queries{0, 0, first, block.n};
        const Rows q = gather(op.q + h * W, op.q_stride, queries, W, padded, q_copies);
        const Rows grad_out = gather(grad.grad_out + h * W, grad.grad_out_stride, queries, W, padded, grad_copies);
        scores(q, padded, W, block, key, weight, stride);
        scores(grad_out, padded, W, block, value, grad_score, stride);
        for (int64_t i = 0; i < block.n; i += ROWS) {
          Lanes products[ROWS] = {};
          T lse[ROWS];
          for (int64_t r = 0; r < ROWS; ++r) {
            const int64_t at = block.at(i + r);
            const T* out = forward.out + (first + at) * forward.out_stride + h * W;
            prefetch_next(out, W);
            for (int64_t w = 0; w < W; w += N)
              products[r] += get(grad_out.at + at * grad_out.stride + w) * get_first(out + w, W - w);
            lse[r] = forward.lse[(first + at) * H + h];
          }
          const Four delta = sums_of(products);
          T *p_row = weight + i * stride, *grad_row = grad_score + i * stride;
          for (int64_t j = 0; j < block.n_seen[i + ROWS - 1]; j += N)
            for (int64_t r = 0; r < ROWS; ++r) {
              const Lanes p = exponential(get(p_row + r * stride + j) * scale - lse[r]);
              put(p_row + r * stride + j, p);
              put(grad_row + r * stride + j, p * (get(grad_row + r * stride + j) - delta[r]) * scale);
            }
        }
        T* const grad_q = grad.grad_q + first * op.q_stride + h * W;
        T* const grad_k = grad.grad_k + s.begin * op.kv_stride + h * W;
        T* const grad_v = grad.grad_v + s.begin * op.kv_stride + h * W;
        mix({grad_score, stride}, block.n, span, k, padded, W, {grad_q, op.q_stride}, 0);
        mix({grad_score, 1, stride}, block.n_keys, sees, q, padded, W, {grad_k, op.kv_stride}, n_known);
        mix({weight, 1, stride}, block.n_keys, sees, grad_out, padded, W, {grad_v, op.kv_stride}, n_known);
        n_known = block.n_keys;
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
