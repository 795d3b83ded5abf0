// Projection of the finite points of one set onto their main directions, approximately the first principal components:
// what a search that needs no exact distances works with.
//
//   z = (x - mean) unit,  row = z . directions        the unit, a power of two, keeps squares within float32
//
// Directions are orthonormal: rows drawn from a sample, after two steps of the power iteration towards the main
// subspace. Where that would save little, rows are z itself.
#pragma once

#include <cstdint>
#include <vector>

namespace clmfast {

class Projection {
 public:
  // At least n_directions, as far as D allows.
  Projection(const float* points, int64_t N, int64_t D, int64_t n_directions);

  int64_t n() const { return static_cast<int64_t>(source_.size()); }
  int64_t width() const { return M_; }                          // a multiple of LANES
  const int64_t* source() const { return source_.data(); }      // [n] where the points stood
  const float* rows() const { return rows_.data(); }            // [n, width]
  const float* panels() const { return panels_.data(); }        // [n / PANEL, width, PANEL], zeros behind the last point
  const float* norm2() const { return norm2_.data(); }          // [n] of the rows
  const double* mean() const { return mean_.data(); }           // [D]
  double scatter() const { return scatter_; }                   // sum of norm2
  double unit2() const { return unit_ * unit_; }
  double full_scatter() const { return full_scatter_; }         // sum of |x - mean|^2

 private:
  std::vector<float> directions(const std::vector<float>& sample) const;

  int64_t D_, M_;
  std::vector<int64_t> source_;
  std::vector<double> mean_;
  double unit_ = 1, scatter_ = 0, full_scatter_ = 0;
  std::vector<float> rows_, panels_, norm2_;
};

}  // namespace clmfast
