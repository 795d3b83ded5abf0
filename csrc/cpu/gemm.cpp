#include "fused.h"  // gemm.h promises chains of multiply-adds

#include "gemm.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "isa.h"
#include "vector.h"

namespace clmfast {
namespace {

constexpr int64_t DEPTH = 256;  // of the summed index, at a time: a panel that deep is half of the first cache
constexpr int64_t STRIP = 12;   // rows of a transposed left factor that lie together

// How the left factor lies: the K numbers of a row side by side, or the rows of one k.
enum class Left { rows, columns };

template <int64_t UNIT>
int64_t round_up(int64_t n) {
  return (n + UNIT - 1) / UNIT * UNIT;
}

// A part of a product: rows against whole panels, `panel_size` floats apart. Element k of row r of the left factor is
// a[r * a_stride + k], or a[k * a_stride + r].
struct Part {
  const float* a;
  int64_t a_stride, n_rows;
  const float* panels;
  int64_t panel_size, n_panels, K;
  Start start;
  float* out;
  int64_t out_stride;
};

// R rows against P panels, W floats to a register.
template <int W, Left left, int R, int P>
CLMFAST_BODY void tile(const Part& part, int64_t row, int64_t i_panel) {
  typedef float Vector __attribute__((vector_size(W * sizeof(float)), aligned(4), may_alias));
  constexpr int C = PANEL / W;
  Vector sum[R][P * C] = {};
  const int64_t column = i_panel * PANEL, a_stride = part.a_stride, panel_size = part.panel_size;
  if (part.start.row) {
    const float* start = part.start.row + row * part.start.stride + column;
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < P * C; ++c)
        sum[r][c] = *reinterpret_cast<const Vector*>(start + r * part.start.stride + c * W);
  }
  const float* a = part.a + (left == Left::rows ? row * a_stride : row);
  const float* panel = part.panels + i_panel * panel_size;
  for (int64_t k = 0; k < part.K; ++k) {
    Vector b[P * C];
    for (int c = 0; c < P * C; ++c)
      b[c] = *reinterpret_cast<const Vector*>(panel + c / C * panel_size + k * PANEL + c % C * W);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < P * C; ++c) sum[r][c] += (left == Left::rows ? a[r * a_stride + k] : a[k * a_stride + r]) * b[c];
  }
  float* out = part.out + row * part.out_stride + column;
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < P * C; ++c) *reinterpret_cast<Vector*>(out + r * part.out_stride + c * W) = sum[r][c];
}

// The rows from `row` on, R at a time as long as there are so many.
template <int W, Left left, int R, int P>
CLMFAST_BODY void tiles(const Part& part, int64_t row, int64_t i_panel) {
  for (; row + R <= part.n_rows; row += R) tile<W, left, R, P>(part, row, i_panel);
  if constexpr (R > 1) {
    if (row < part.n_rows) tiles<W, left, R - (R + 2) / 3, P>(part, row, i_panel);
  }
}

template <int W, Left left, int R, int P>
CLMFAST_BODY void multiply_part(const Part& part) {
  int64_t i = 0;
  for (; i + P <= part.n_panels; i += P) tiles<W, left, R, P>(part, 0, i);
  if constexpr (P > 1) {
    for (; i < part.n_panels; ++i) tiles<W, left, R, 1>(part, 0, i);
  }
}

// 12 x 16 floats are 12 of the 16 AVX2 registers, 12 x 32 are 24 of the 32 of AVX-512.
template <Left left>
void part_baseline(const Part& part) { multiply_part<4, left, 2, 1>(part); }
template <Left left>
CLMFAST_AVX2 void part_avx2(const Part& part) { multiply_part<8, left, 6, 1>(part); }
template <Left left>
CLMFAST_AVX512 void part_avx512(const Part& part) { multiply_part<16, left, 12, 2>(part); }

template <Left left>
void any_part(const Part& part) {
  static const auto once = pick(part_baseline<left>, part_avx2<left>, part_avx512<left>);
  once(part);
}

// `any_part` for a right factor of n columns, whatever n: the last ones go through a tile of full width.
template <Left left>
void any_columns(Part part, int64_t n) {
  part.n_panels = n / PANEL;
  any_part<left>(part);
  const int64_t whole = part.n_panels * PANEL, rest = n - whole;
  if (!rest) return;
  float buffer[STRIP * PANEL] = {};
  Part last = part;
  last.panels += part.n_panels * part.panel_size;
  last.n_panels = 1;
  last.start = {buffer, PANEL};
  last.out = buffer;
  last.out_stride = PANEL;
  for (int64_t row = 0; row < part.n_rows; row += STRIP) {
    last.a = part.a + (left == Left::rows ? row * part.a_stride : row);
    last.n_rows = std::min(STRIP, part.n_rows - row);
    for (int64_t r = 0; r < last.n_rows; ++r) {
      float* to = buffer + r * PANEL;
      if (part.start.row)
        std::memcpy(to, part.start.row + (row + r) * part.start.stride + whole, rest * sizeof(float));
      else
        std::memset(to, 0, rest * sizeof(float));
    }
    any_part<left>(last);
    for (int64_t r = 0; r < last.n_rows; ++r)
      std::memcpy(part.out + (row + r) * part.out_stride + whole, buffer + r * PANEL, rest * sizeof(float));
  }
}

// Columns n of K rows, SIDE of them side by side: to [block][K][SIDE], the last block padded with zeros.
template <int64_t SIDE>
CLMFAST_BODY void pack_columns(const float* from, int64_t stride, int64_t K, int64_t n, float* to) {
  const int64_t whole = n / SIDE * SIDE;
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t i = 0; i < whole; i += SIDE) std::memcpy(to + i * K + k * SIDE, from + k * stride + i, SIDE * sizeof(float));
    for (int64_t i = whole; whole < n && i < whole + SIDE; ++i)
      to[whole * K + k * SIDE + i - whole] = i < n ? from[k * stride + i] : 0;
  }
}

CLMFAST_BODY void pack_panels_body(const float* from, int64_t stride, int64_t K, int64_t n, float* to) {
  pack_columns<PANEL>(from, stride, K, n, to);
}
CLMFAST_BODY void pack_strips_body(const float* from, int64_t stride, int64_t K, int64_t n, float* to) {
  pack_columns<STRIP>(from, stride, K, n, to);
}
CLMFAST_PER_ISA(void, pack_panels, (const float* from, int64_t stride, int64_t K, int64_t n, float* to),
                (from, stride, K, n, to))
CLMFAST_PER_ISA(void, pack_strips, (const float* from, int64_t stride, int64_t K, int64_t n, float* to),
                (from, stride, K, n, to))

// The numbers of a and b in turns, begun in their middle if `high`.
template <class Vector, int... I>
CLMFAST_BODY Vector interleaved(Vector a, Vector b, bool high, std::integer_sequence<int, I...>) {
  constexpr int W = sizeof...(I);
  return high ? __builtin_shufflevector(a, b, (W / 2 + I / 2 + I % 2 * W)...)
              : __builtin_shufflevector(a, b, (I / 2 + I % 2 * W)...);
}

// The transpose of n <= PANEL rows of K numbers: to [K, PANEL], padded with zeros. W x W of them become their transpose
// by log2 W rounds that interleave the first half of the rows with the second.
template <int W>
CLMFAST_BODY void pack_transposed(const float* from, int64_t stride, int64_t K, int64_t n, float* to) {
  typedef float Vector __attribute__((vector_size(W * sizeof(float)), aligned(4), may_alias));
  const int64_t whole = n == PANEL ? K / W * W : 0;
  for (int64_t k = 0; k < whole; k += W) {
    for (int64_t first = 0; first < PANEL; first += W) {
      Vector row[W];
      for (int i = 0; i < W; ++i) row[i] = *reinterpret_cast<const Vector*>(from + (first + i) * stride + k);
      for (int round = 1; round < W; round *= 2) {
        Vector mixed[W];
        for (int i = 0; i < W; ++i)
          mixed[i] = interleaved(row[i / 2], row[i / 2 + W / 2], i % 2, std::make_integer_sequence<int, W>());
        for (int i = 0; i < W; ++i) row[i] = mixed[i];
      }
      for (int i = 0; i < W; ++i) *reinterpret_cast<Vector*>(to + (k + i) * PANEL + first) = row[i];
    }
  }
  for (int64_t k = whole; k < K; ++k)
    for (int64_t i = 0; i < PANEL; ++i) to[k * PANEL + i] = i < n ? from[i * stride + k] : 0;
}

void pack_rows_baseline(const float* from, int64_t stride, int64_t K, int64_t n, float* to) {
  pack_transposed<4>(from, stride, K, n, to);
}
CLMFAST_AVX2 void pack_rows_avx2(const float* from, int64_t stride, int64_t K, int64_t n, float* to) {
  pack_transposed<8>(from, stride, K, n, to);
}
CLMFAST_AVX512 void pack_rows_avx512(const float* from, int64_t stride, int64_t K, int64_t n, float* to) {
  pack_transposed<16>(from, stride, K, n, to);
}

void pack_rows(const float* from, int64_t stride, int64_t K, int64_t n, float* to) {
  static const auto once = pick(pack_rows_baseline, pack_rows_avx2, pack_rows_avx512);
  once(from, stride, K, n, to);
}

// So many columns at a time that their chains of additions hide each other's latency.
CLMFAST_BODY void column_sums_any_body(const float* a, int64_t a_stride, int64_t T, int64_t n_out, float* out) {
  constexpr int64_t C = 3;
  int64_t o = 0;
  for (; o + C * LANES <= n_out; o += C * LANES) {
    Vector<float> sum[C] = {};
    for (int64_t t = 0; t < T; ++t)
      for (int64_t c = 0; c < C; ++c) sum[c] += load(a + t * a_stride + o + c * LANES);
    for (int64_t c = 0; c < C; ++c) store(out + o + c * LANES, sum[c]);
  }
  std::memset(out + o, 0, (n_out - o) * sizeof(float));
  for (int64_t t = 0; o < n_out && t < T; ++t)
    for (int64_t i = o; i < n_out; ++i) out[i] += a[t * a_stride + i];
}

CLMFAST_PER_ISA(void, column_sums_any, (const float* a, int64_t a_stride, int64_t T, int64_t n_out, float* out),
                (a, a_stride, T, n_out, out))

}  // namespace

Panels::Panels(const float* from, int64_t K, int64_t N, int64_t stride_k, int64_t stride_n)
    : from_(from), K_(K), N_(N), stride_k_(stride_k), stride_n_(stride_n), panels_(new float[n_panels() * K * PANEL]) {}

void Panels::pack(int64_t i_panel) {
  float* to = panels_.get() + i_panel * K_ * PANEL;
  const int64_t first = i_panel * PANEL, n = std::min(PANEL, N_ - first);
  if (stride_n_ == 1)
    pack_panels(from_ + first, stride_k_, K_, n, to);
  else
    pack_rows(from_ + first * stride_n_, stride_n_, K_, n, to);
}

void multiply(const float* a, int64_t a_stride, int64_t n_rows, const Panels& b, Start start, float* out,
              int64_t out_stride) {
  int64_t k = 0;
  do {
    any_columns<Left::rows>({a + k, a_stride, n_rows, b.panel(0) + k * PANEL, b.K() * PANEL, 0,
                             std::min(DEPTH, b.K() - k), k ? Start{out, out_stride} : start, out, out_stride},
                            b.N());
  } while ((k += DEPTH) < b.K());
}

void multiply_transposed(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t T, int64_t n_out,
                         int64_t n_in, float* out, int64_t out_stride) {
  // Copies, because rows that lie a power of two apart share a few places of the first cache.
  const int64_t depth = std::min(DEPTH, T);
  std::unique_ptr<float[]> left(new float[depth * round_up<STRIP>(n_out)]);
  std::unique_ptr<float[]> right(new float[depth * round_up<PANEL>(n_in)]);
  int64_t t = 0;
  do {
    const int64_t K = std::min(DEPTH, T - t);
    pack_strips(a + t * a_stride, a_stride, K, n_out, left.get());
    pack_panels(b + t * b_stride, b_stride, K, n_in, right.get());
    for (int64_t o = 0; o < n_out; o += STRIP) {
      float* to = out + o * out_stride;
      any_columns<Left::columns>({&left[o * K], STRIP, std::min(STRIP, n_out - o), right.get(), K * PANEL, 0, K,
                                  t ? Start{to, out_stride} : Start{}, to, out_stride},
                                 n_in);
    }
  } while ((t += DEPTH) < T);
}

void column_sums(const float* a, int64_t a_stride, int64_t T, int64_t n_out, float* out) {
  column_sums_any(a, a_stride, T, n_out, out);
}

}  // namespace clmfast
