// Matrix products of activations and weights, float32, at the rate of fused multiply-add.
//
// Every element of a product is one chain of multiply-adds in the order of the summed index, begun at `start`. So it
// depends on its own row and column alone: not on how many rows stand beside it, on threads or on blocks. (Instruction
// sets without fused multiply-add round differently.)
#pragma once

#include <cstdint>
#include <memory>

namespace clmfast {

constexpr int64_t PANEL = 16;  // columns that lie together
constexpr int64_t ROWS = 48;   // rows of one task at most: their activations stay in the second cache

// The right factor [K, N] of a product, laid out in panels [K, PANEL] that are read front to back; columns beyond N are
// zero.
class Panels {
 public:
  // Element (k, n) of the matrix is from[k * stride_k + n * stride_n]; one of the strides is 1.
  Panels(const float* from, int64_t K, int64_t N, int64_t stride_k, int64_t stride_n);

  int64_t n_panels() const { return (N_ + PANEL - 1) / PANEL; }
  void pack(int64_t i_panel);  // has to be called once for each panel; they may be packed in parallel
  const float* panel(int64_t i_panel) const { return panels_.get() + i_panel * K_ * PANEL; }
  int64_t K() const { return K_; }
  int64_t N() const { return N_; }

 private:
  const float* from_;
  int64_t K_, N_, stride_k_, stride_n_;
  std::unique_ptr<float[]> panels_;
};

// Rows that lie `stride` floats apart; stride 0: all are the same one.
struct Start {
  const float* row = nullptr;  // null: zeros
  int64_t stride = 0;
};

// out[r, n] = start[r, n] + sum_k a[r, k] b[k, n] for r < n_rows. Rows lie a_stride and out_stride apart; start may be
// out itself.
void multiply(const float* a, int64_t a_stride, int64_t n_rows, const Panels& b, Start start, float* out,
              int64_t out_stride);

// The columns of activations [T, N] in panels [T, PANEL], one after the other, those beyond N zero: what
// multiply_transposed reads from front to back. (Rows that lie a power of two apart share a few places of the first
// cache.)
class Columns {
 public:
  Columns(float* panels, int64_t T, int64_t N) : panels_(panels), T_(T), N_(N) {}

  static int64_t size(int64_t T, int64_t N) { return T * ((N + PANEL - 1) / PANEL) * PANEL; }
  // Rows [first, first + n_rows) come from `from`, where they lie `stride` apart.
  void put(int64_t first, int64_t n_rows, const float* from, int64_t stride);
  const float* panel(int64_t i_panel) const { return panels_ + i_panel * T_ * PANEL; }
  int64_t T() const { return T_; }
  int64_t N() const { return N_; }

 private:
  float* panels_;
  int64_t T_, N_;
};

// out[o, i] = sum_t a[t, o] b[t, i], o in [first, first + n_out) and i in [first_in, first_in + n_in): a part of a
// weight's gradient. The t are those of a; b may have more behind them. `first` and `first_in` are multiples of PANEL. Rows of the whole out [., b.N()] lie side by side.
void multiply_transposed(const Columns& a, const Columns& b, int64_t first, int64_t n_out, int64_t first_in,
                         int64_t n_in, float* out);

// out[o] = sum_t a[t, o], in the order of t, o in [first, first + n_out).
void column_sums(const Columns& a, int64_t first, int64_t n_out, float* out);

// out[o] = sum_t a[t * a_stride + o], in the order of t.
void column_sums(const float* a, int64_t a_stride, int64_t T, int64_t n_out, float* out);

}  // namespace clmfast
