#include "fused.h"  // gemm.h promises chains of multiply-adds

#include "gemm.h"

#include <algorithm>
#include <cstring>

#include "isa.h"
#include "vector.h"

namespace clmfast {
namespace {

constexpr int64_t DEPTH = 256;  // rows t that a block of multiply_transposed takes at a time: they stay in the cache
constexpr int64_t OUT_ROWS = 12;

// How the left factor lies: the K numbers of a row side by side, or the rows of one k.
enum class Left { rows, columns };

// R rows against one panel, W floats to a register. Element k of row r is a[r * a_stride + k], or a[k * a_stride + r].
template <int W, Left left, int R>
CLMFAST_BODY void tile(const float* a, int64_t a_stride, const float* panel, int64_t panel_stride, int64_t K,
                       const float* start, int64_t start_stride, float* out, int64_t out_stride) {
  typedef float Vector __attribute__((vector_size(W * sizeof(float)), aligned(4), may_alias));
  constexpr int C = PANEL / W;
  Vector sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = *reinterpret_cast<const Vector*>(start + r * start_stride + c * W);
  for (int64_t k = 0; k < K; ++k) {
    const Vector* b = reinterpret_cast<const Vector*>(panel + k * panel_stride);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sum[r][c] += (left == Left::rows ? a[r * a_stride + k] : a[k * a_stride + r]) * b[c];
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) *reinterpret_cast<Vector*>(out + r * out_stride + c * W) = sum[r][c];
}

// n_rows rows, R at a time as long as there are so many.
template <int W, Left left, int R>
CLMFAST_BODY void tiles(const float* a, int64_t a_stride, const float* panel, int64_t panel_stride, int64_t K,
                        const float* start, int64_t start_stride, float* out, int64_t out_stride, int64_t n_rows) {
  const int64_t next = left == Left::rows ? a_stride : 1;
  int64_t r = 0;
  for (; r + R <= n_rows; r += R)
    tile<W, left, R>(a + r * next, a_stride, panel, panel_stride, K, start + r * start_stride, start_stride,
                     out + r * out_stride, out_stride);
  if constexpr (R > 1) {
    if (r < n_rows)
      tiles<W, left, (R + 1) / 2>(a + r * next, a_stride, panel, panel_stride, K, start + r * start_stride,
                                  start_stride, out + r * out_stride, out_stride, n_rows - r);
  }
}

#define CLMFAST_TILES_PARAMETERS                                                                                 \
  (const float* a, int64_t a_stride, const float* panel, int64_t panel_stride, int64_t K, const float* start,    \
   int64_t start_stride, float* out, int64_t out_stride, int64_t n_rows)
#define CLMFAST_TILES_ARGUMENTS (a, a_stride, panel, panel_stride, K, start, start_stride, out, out_stride, n_rows)

template <Left left>
void tiles_baseline CLMFAST_TILES_PARAMETERS { tiles<4, left, 1> CLMFAST_TILES_ARGUMENTS; }
template <Left left>
CLMFAST_AVX2 void tiles_avx2 CLMFAST_TILES_PARAMETERS { tiles<8, left, 3> CLMFAST_TILES_ARGUMENTS; }
template <Left left>
CLMFAST_AVX512 void tiles_avx512 CLMFAST_TILES_PARAMETERS { tiles<16, left, 12> CLMFAST_TILES_ARGUMENTS; }

template <Left left>
void any_tiles CLMFAST_TILES_PARAMETERS {
  static const auto once = pick(tiles_baseline<left>, tiles_avx2<left>, tiles_avx512<left>);
  once CLMFAST_TILES_ARGUMENTS;
}

// `any_tiles` for a panel of which only n columns exist: through a tile of full width. At most OUT_ROWS rows.
template <Left left>
void narrow_tiles(const float* a, int64_t a_stride, const float* panel, int64_t panel_stride, int64_t K,
                  const float* start, int64_t start_stride, float* out, int64_t out_stride, int64_t n_rows, int64_t n) {
  float begin[OUT_ROWS * PANEL] = {}, end[OUT_ROWS * PANEL];
  for (int64_t r = 0; start && r < n_rows; ++r)
    std::memcpy(begin + r * PANEL, start + r * start_stride, n * sizeof(float));
  any_tiles<left>(a, a_stride, panel, panel_stride, K, begin, PANEL, end, PANEL, n_rows);
  for (int64_t r = 0; r < n_rows; ++r) std::memcpy(out + r * out_stride, end + r * PANEL, n * sizeof(float));
}

CLMFAST_BODY void column_sums_any_body(const float* a, int64_t a_stride, int64_t T, int64_t n_out, float* out) {
  std::memset(out, 0, n_out * sizeof(float));
  for (int64_t t = 0; t < T; ++t)
    for (int64_t o = 0; o < n_out; ++o) out[o] += a[t * a_stride + o];
}

CLMFAST_PER_ISA(void, column_sums_any, (const float* a, int64_t a_stride, int64_t T, int64_t n_out, float* out),
                (a, a_stride, T, n_out, out))

constexpr float ZEROS[PANEL] = {};

}  // namespace

Panels::Panels(const float* from, int64_t K, int64_t N, int64_t stride_k, int64_t stride_n)
    : from_(from), K_(K), N_(N), stride_k_(stride_k), stride_n_(stride_n), panels_(new float[n_panels() * K * PANEL]) {}

void Panels::pack(int64_t i_panel) {
  float* to = panels_.get() + i_panel * K_ * PANEL;
  const int64_t first = i_panel * PANEL, n = std::min(PANEL, N_ - first);
  const float* from = from_ + first * stride_n_;
  if (n < PANEL) std::memset(to, 0, K_ * PANEL * sizeof(float));
  if (stride_n_ == 1) {
    for (int64_t k = 0; k < K_; ++k) copy<PANEL>(from + k * stride_k_, n, to + k * PANEL);
    return;
  }
  constexpr int64_t SQUARE = 16;  // sixteen steps at a time: whole cache lines on both sides
  for (int64_t k0 = 0; k0 < K_; k0 += SQUARE)
    for (int64_t c = 0; c < n; ++c)
      for (int64_t k = k0; k < std::min(K_, k0 + SQUARE); ++k) to[k * PANEL + c] = from[c * stride_n_ + k * stride_k_];
}

void multiply(const float* a, int64_t a_stride, int64_t n_rows, const Panels& b, const float* start, float* out,
              int64_t out_stride) {
  for (int64_t i = 0; i < b.n_panels(); ++i) {
    const int64_t first = i * PANEL, n = std::min(PANEL, b.N() - first);
    const float* begin = start ? start + first : nullptr;
    if (n == PANEL) {
      any_tiles<Left::rows>(a, a_stride, b.panel(i), PANEL, b.K(), begin ? begin : ZEROS, 0, out + first, out_stride,
                            n_rows);
    } else {
      for (int64_t r = 0; r < n_rows; r += OUT_ROWS)
        narrow_tiles<Left::rows>(a + r * a_stride, a_stride, b.panel(i), PANEL, b.K(), begin, 0,
                                 out + r * out_stride + first, out_stride, std::min(OUT_ROWS, n_rows - r), n);
    }
  }
}

void multiply_transposed(const float* a, int64_t a_stride, const float* b, int64_t n_in, int64_t T, int64_t n_out,
                         float* out) {
  std::memset(out, 0, n_out * n_in * sizeof(float));
  // Copies, because rows that lie a power of two apart share a few places of the first cache.
  std::unique_ptr<float[]> left(new float[DEPTH * n_out]), panel(new float[DEPTH * PANEL]());
  for (int64_t t = 0; t < T; t += DEPTH) {
    const int64_t depth = std::min(DEPTH, T - t);
    for (int64_t o = 0; o < n_out; o += OUT_ROWS) {
      const int64_t n_rows = std::min(OUT_ROWS, n_out - o);
      for (int64_t k = 0; k < depth; ++k)
        copy<OUT_ROWS>(a + (t + k) * a_stride + o, n_rows, &left[DEPTH * o + k * n_rows]);
    }
    for (int64_t i = 0; i < n_in; i += PANEL) {
      const int64_t n = std::min(PANEL, n_in - i);
      for (int64_t k = 0; k < depth; ++k) copy<PANEL>(b + (t + k) * n_in + i, n, &panel[k * PANEL]);
      for (int64_t o = 0; o < n_out; o += OUT_ROWS) {
        const int64_t n_rows = std::min(OUT_ROWS, n_out - o);
        float* to = out + o * n_in + i;
        if (n == PANEL)
          any_tiles<Left::columns>(&left[DEPTH * o], n_rows, panel.get(), PANEL, depth, to, n_in, to, n_in, n_rows);
        else
          narrow_tiles<Left::columns>(&left[DEPTH * o], n_rows, panel.get(), PANEL, depth, to, n_in, to, n_in, n_rows,
                                      n);
      }
    }
  }
}

void column_sums(const float* a, int64_t a_stride, int64_t T, int64_t n_out, float* out) {
  column_sums_any(a, a_stride, T, n_out, out);
}

}  // namespace clmfast
