#include "fused.h"  // gemm.h promises chains of multiply-adds

#include "gemm.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "isa.h"
#include "lanes.h"

namespace clmfast {
namespace {

constexpr int64_t DEPTH = 256;    // of the summed index, at a time: a panel that deep is half of the first cache
constexpr int64_t DEPTH_T = 192;  // the same where both factors are panels; best of 128..384 at T=1392, Zen 3

// How the left factor lies: the K numbers of a row side by side, or the rows of one k.
enum class Left { rows, columns };

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
  constexpr int C = PANEL / W;
  Lanes<W> sum[R][P * C] = {};
  const int64_t column = i_panel * PANEL, a_stride = part.a_stride, panel_size = part.panel_size;
  if (part.start.row) {
    const float* start = part.start.row + row * part.start.stride + column;
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < P * C; ++c)
        sum[r][c] = lanes<W>(start + r * part.start.stride + c * W);
  }
  const float* a = part.a + (left == Left::rows ? row * a_stride : row);
  const float* panel = part.panels + i_panel * panel_size;
  for (int64_t k = 0; k < part.K; ++k) {
    Lanes<W> b[P * C];
    for (int c = 0; c < P * C; ++c)
      b[c] = lanes<W>(panel + c / C * panel_size + k * PANEL + c % C * W);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < P * C; ++c)
        sum[r][c] += (left == Left::rows ? a[r * a_stride + k] : a[k * a_stride + r]) * b[c];
  }
  float* out = part.out + row * part.out_stride + column;
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < P * C; ++c) lanes<W>(out + r * part.out_stride + c * W) = sum[r][c];
}

// `tile` of n <= R rows.
template <int W, Left left, int R, int P>
CLMFAST_BODY void tile_of(int64_t n, const Part& part, int64_t row, int64_t i_panel) {
  if constexpr (R > 1) {
    if (n < R) return tile_of<W, left, R - 1, P>(n, part, row, i_panel);
  }
  tile<W, left, R, P>(part, row, i_panel);
}

// Rows in tiles of at most R, all as high as possible: low ones would wait for their few chains of multiply-adds.
template <int W, Left left, int R, int P>
CLMFAST_BODY void multiply_part(const Part& part) {
  const int64_t n_tiles = (part.n_rows + R - 1) / R;
  if (!n_tiles) return;
  const int64_t n = part.n_rows / n_tiles, n_higher = part.n_rows % n_tiles;
  for (int64_t i = 0; i < part.n_panels;) {
    const bool is_wide = i + P <= part.n_panels;
    for (int64_t t = 0, row = 0; t < n_tiles; ++t) {
      const int64_t n_rows = n + (t < n_higher);
      if (is_wide)
        tile_of<W, left, R, P>(n_rows, part, row, i);
      else if constexpr (P > 1)
        tile_of<W, left, R, 1>(n_rows, part, row, i);
      row += n_rows;
    }
    i += is_wide ? P : 1;
  }
}

// 6 x 16 floats are 12 of the 16 AVX2 registers, 12 x 32 are 24 of the 32 of AVX-512.
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
  float buffer[PANEL * PANEL] = {};
  Part last = part;
  last.panels += part.n_panels * part.panel_size;
  last.n_panels = 1;
  last.start = {buffer, PANEL};
  last.out = buffer;
  last.out_stride = PANEL;
  for (int64_t row = 0; row < part.n_rows; row += PANEL) {
    last.a = part.a + (left == Left::rows ? row * part.a_stride : row);
    last.n_rows = std::min(PANEL, part.n_rows - row);
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

// N columns of n_rows rows, PANEL of them side by side, padded with zeros: panels lie panel_size apart.
CLMFAST_BODY void pack_columns_body(const float* from, int64_t stride, int64_t n_rows, int64_t N, float* to,
                                    int64_t panel_size) {
  const int64_t whole = N / PANEL * PANEL;
  for (int64_t r = 0; r < n_rows; ++r, from += stride, to += PANEL) {
    float* panel = to;
    for (int64_t i = 0; i < whole; i += PANEL, panel += panel_size) std::memcpy(panel, from + i, PANEL * sizeof(float));
    for (int64_t i = whole; whole < N && i < whole + PANEL; ++i) panel[i - whole] = i < N ? from[i] : 0;
  }
}

CLMFAST_PER_ISA(void, pack_columns,
                (const float* from, int64_t stride, int64_t n_rows, int64_t N, float* to, int64_t panel_size),
                (from, stride, n_rows, N, to, panel_size))

// The transpose of n <= PANEL rows of K numbers: to [K, PANEL], padded with zeros.
template <int W>
CLMFAST_BODY void pack_rows_body(const float* from, int64_t stride, int64_t K, int64_t n, float* to) {
  const int64_t whole = n == PANEL ? K / W * W : 0;
  for (int64_t k = 0; k < whole; k += W) {
    for (int64_t first = 0; first < PANEL; first += W) {
      Lanes<W> row[W];
      for (int i = 0; i < W; ++i) row[i] = lanes<W>(from + (first + i) * stride + k);
      transpose<W>(row);
      for (int i = 0; i < W; ++i) lanes<W>(to + (k + i) * PANEL + first) = row[i];
    }
  }
  for (int64_t k = whole; k < K; ++k)
    for (int64_t i = 0; i < PANEL; ++i) to[k * PANEL + i] = i < n ? from[i * stride + k] : 0;
}

CLMFAST_PER_WIDTH(pack_rows, (const float* from, int64_t stride, int64_t K, int64_t n, float* to),
                  (from, stride, K, n, to))

template <int W>
CLMFAST_BODY void column_sums_any_body(const float* a, int64_t a_stride, int64_t T, int64_t n_out, float* out) {
  constexpr int C = PANEL / W;
  int64_t o = 0;
  for (; o + C * W <= n_out; o += C * W) {
    Lanes<W> sum[C] = {};
    for (int64_t t = 0; t < T; ++t)
      for (int c = 0; c < C; ++c) sum[c] += lanes<W>(a + t * a_stride + o + c * W);
    for (int c = 0; c < C; ++c) lanes<W>(out + o + c * W) = sum[c];
  }
  std::memset(out + o, 0, (n_out - o) * sizeof(float));
  for (int64_t t = 0; o < n_out && t < T; ++t)
    for (int64_t i = o; i < n_out; ++i) out[i] += a[t * a_stride + i];
}

CLMFAST_PER_WIDTH(column_sums_any, (const float* a, int64_t a_stride, int64_t T, int64_t n_out, float* out),
                  (a, a_stride, T, n_out, out))

}  // namespace

Panels::Panels(const float* from, int64_t K, int64_t N, int64_t stride_k, int64_t stride_n)
    : from_(from), K_(K), N_(N), stride_k_(stride_k), stride_n_(stride_n), panels_(new float[n_panels() * K * PANEL]) {}

void Panels::pack(int64_t i_panel) {
  float* to = panels_.get() + i_panel * K_ * PANEL;
  const int64_t first = i_panel * PANEL, n = std::min(PANEL, N_ - first);
  if (stride_n_ == 1)
    pack_columns(from_ + first, stride_k_, K_, n, to, 0);
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

void Columns::put(int64_t first, int64_t n_rows, const float* from, int64_t stride) {
  pack_columns(from, stride, n_rows, N_, panels_ + first * PANEL, T_ * PANEL);
}

void multiply_transposed(const Columns& a, const Columns& b, int64_t first, int64_t n_out, int64_t first_in,
                         int64_t n_in, float* out) {
  const int64_t T = a.T(), stride = b.N();
  int64_t t = 0;
  do {
    for (int64_t o = first; o < first + n_out; o += PANEL) {
      float* to = out + o * stride + first_in;
      any_columns<Left::columns>(
          {a.panel(o / PANEL) + t * PANEL, PANEL, std::min(PANEL, first + n_out - o),
           b.panel(first_in / PANEL) + t * PANEL, b.T() * PANEL, 0, std::min(DEPTH_T, T - t),
           t ? Start{to, stride} : Start{}, to, stride},
          n_in);
    }
  } while ((t += DEPTH_T) < T);
}

void column_sums(const Columns& a, int64_t first, int64_t n_out, float* out) {
  for (int64_t o = 0; o < n_out; o += PANEL)
    column_sums_any(a.panel((first + o) / PANEL), PANEL, a.T(), std::min(PANEL, n_out - o), out + o);
}

void column_sums(const float* a, int64_t a_stride, int64_t T, int64_t n_out, float* out) {
  column_sums_any(a, a_stride, T, n_out, out);
}

}  // namespace clmfast
