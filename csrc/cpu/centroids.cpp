#include "fused.h"  // screens promise a bound, not bits

#include "centroids.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "isa.h"
#include "pair.h"

namespace clmfast {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int64_t WIDTH = 8;  // floats to a register
constexpr int64_t TILE = 4;   // rows side by side: with three registers of centroids, 12 sums and 4 operands

typedef float Eight __attribute__((vector_size(WIDTH * sizeof(float)), aligned(4), may_alias));
typedef int32_t EightI __attribute__((vector_size(WIDTH * sizeof(float)), aligned(4), may_alias));

CLMFAST_BODY Eight eight(const float* from) { return *reinterpret_cast<const Eight*>(from); }

CLMFAST_BODY float sum_of(Eight x) {
  x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
  x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
  return x[0] + x[1];
}

struct Screen {
  const float *centre, *columns, *norm2;
  int64_t D, n_blocks, n_registers;  // registers of the last block that hold centroids
  float scale, kappa, eta, largest_norm2;
};

// p~ [D] and, returned, its squared norm.
CLMFAST_BODY float place(const float* point, const Screen& screen, float* out) {
  Eight squares[4] = {};
  int64_t d = 0;
  for (; d + 4 * WIDTH <= screen.D; d += 4 * WIDTH) {
    for (int64_t e = 0; e < 4; ++e) {
      const Eight x = eight(point + d + e * WIDTH) * screen.scale - eight(screen.centre + d + e * WIDTH);
      *reinterpret_cast<Eight*>(out + d + e * WIDTH) = x;
      squares[e] += x * x;
    }
  }
  float norm2 = sum_of((squares[0] + squares[2]) + (squares[1] + squares[3]));
  for (; d < screen.D; ++d) {
    out[d] = point[d] * screen.scale - screen.centre[d];
    norm2 += out[d] * out[d];
  }
  return norm2;
}

// out[r, GROUPS] = |c~|^2 - 2 c~.p~ of R placed rows, D floats apart, and C registers of one block.
template <int R, int C>
CLMFAST_BODY void screen_block(const float* placed, const float* columns, const float* norm2, int64_t D, float* out,
                               int64_t stride) {
  Eight sum[R][C] = {};
  for (int64_t d = 0; d < D; ++d) {
    Eight column[C];
    for (int c = 0; c < C; ++c) column[c] = eight(columns + d * GROUPS + c * WIDTH);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sum[r][c] += placed[r * D + d] * column[c];
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c)
      *reinterpret_cast<Eight*>(out + r * stride + c * WIDTH) =
          eight(norm2 + c * WIDTH) - 2 * sum[r][c];
}

template <int R>
CLMFAST_BODY void screen_rows(const float* placed, const Screen& screen, float* out) {
  const int64_t D = screen.D, stride = screen.n_blocks * GROUPS;
  for (int64_t b = 0; b < screen.n_blocks; ++b) {
    const float *columns = screen.columns + b * D * GROUPS, *norm2 = screen.norm2 + b * GROUPS;
    const int64_t n = b + 1 < screen.n_blocks ? GROUPS / WIDTH : screen.n_registers;
    if (n == 1) screen_block<R, 1>(placed, columns, norm2, D, out + b * GROUPS, stride);
    else if (n == 2) screen_block<R, 2>(placed, columns, norm2, D, out + b * GROUPS, stride);
    else screen_block<R, 3>(placed, columns, norm2, D, out + b * GROUPS, stride);
  }
}

// What the screen says of TILE rows.
struct Verdict {
  float norm2, limit, slack;  // centroids whose v is at most the limit may be the nearest
  int32_t label, n_close;     // the first of them, and how many there are
};

// screened [TILE, n_blocks, GROUPS]; registers without a centroid are left as they are, and hold infinity.
template <int R>
CLMFAST_BODY void screen_tile_body(const Screen& screen, const float* const* point, const int32_t* excluded,
                                   float* placed, float* screened, Verdict* verdict) {
  const int64_t width = screen.n_blocks * GROUPS;
  for (int64_t r = 0; r < TILE; ++r) verdict[r].norm2 = place(point[r], screen, placed + r * screen.D);
  for (int64_t r = 0; r < TILE; r += R) screen_rows<R>(placed + r * screen.D, screen, screened + r * width);
  for (int64_t r = 0; r < TILE; ++r) {
    float* v = screened + r * width;
    if (excluded && excluded[r] >= 0) v[excluded[r]] = INF;
    Eight least = eight(v);
    for (int64_t k = WIDTH; k < width; k += WIDTH) {
      const Eight x = eight(v + k);
      least = x < least ? x : least;
    }
    float best = least[0];
    for (int64_t l = 1; l < WIDTH; ++l) best = least[l] < best ? least[l] : best;
    // Twice the bound, for the best and for its rival; twice that again covers the float32 arithmetic done here.
    verdict[r].slack = 4 * (screen.kappa * (screen.largest_norm2 + verdict[r].norm2) + screen.eta);
    verdict[r].limit = best + verdict[r].slack;
    EightI close = {};
    const Eight limit = Eight{} + verdict[r].limit;
    for (int64_t k = 0; k < width; k += WIDTH) close += eight(v + k) <= limit;
    int32_t n_close = 0;
    for (int64_t l = 0; l < WIDTH; ++l) n_close -= close[l];
    verdict[r].n_close = n_close;
    int32_t label = 0;
    while (label + 1 < width && !(v[label] <= verdict[r].limit)) ++label;
    verdict[r].label = label;
  }
}

using ScreenTile = void (*)(const Screen&, const float* const*, const int32_t*, float*, float*, Verdict*);

void screen_tile_baseline(const Screen& screen, const float* const* point, const int32_t* excluded, float* placed,
                          float* screened, Verdict* verdict) {
  screen_tile_body<1>(screen, point, excluded, placed, screened, verdict);
}
CLMFAST_AVX2 void screen_tile_avx2(const Screen& screen, const float* const* point, const int32_t* excluded,
                                   float* placed, float* screened, Verdict* verdict) {
  screen_tile_body<TILE>(screen, point, excluded, placed, screened, verdict);
}
CLMFAST_AVX512 void screen_tile_avx512(const Screen& screen, const float* const* point, const int32_t* excluded,
                                       float* placed, float* screened, Verdict* verdict) {
  screen_tile_body<TILE>(screen, point, excluded, placed, screened, verdict);
}

// beyond [GROUPS] of a row with one close centroid, which is `own`.
CLMFAST_BODY void find_beyond_body(const float* screened, int64_t n_blocks, int32_t own, float offset, float factor,
                                   float* beyond) {
  float least[GROUPS];
  for (int64_t g = 0; g < GROUPS; ++g) least[g] = INF;
  for (int64_t k = 0; k < n_blocks * GROUPS; k += GROUPS)
    for (int64_t g = 0; g < GROUPS; ++g) {
      const float x = k + g == own ? INF : screened[k + g];
      least[g] = x < least[g] ? x : least[g];
    }
  for (int64_t g = 0; g < GROUPS; ++g) {
    const float below = least[g] + offset;
    beyond[g] = std::sqrt(below > 0 ? below : 0) * factor;
  }
}

CLMFAST_PER_ISA(void, find_beyond,
                (const float* screened, int64_t n_blocks, int32_t own, float offset, float factor, float* beyond),
                (screened, n_blocks, own, offset, factor, beyond))

// sum_d (a_d - b_d)^2
CLMFAST_BODY float difference2_body(const float* a, const float* b, int64_t D) {
  Eight squares[4] = {};
  int64_t d = 0;
  for (; d + 4 * WIDTH <= D; d += 4 * WIDTH) {
    for (int64_t e = 0; e < 4; ++e) {
      const Eight x = eight(a + d + e * WIDTH) - eight(b + d + e * WIDTH);
      squares[e] += x * x;
    }
  }
  float sum = sum_of((squares[0] + squares[2]) + (squares[1] + squares[3]));
  for (; d < D; ++d) sum += (a[d] - b[d]) * (a[d] - b[d]);
  return sum;
}

CLMFAST_PER_ISA(float, difference2, (const float* a, const float* b, int64_t D), (a, b, D))

CLMFAST_BODY void least_dist2_body(const float* points, int64_t N, int64_t D, const float* const* row,
                                   const float* closest, const int32_t* nearest, const float* limit, float* least) {
  for (int64_t i = 0; i < N; ++i) {
    if (closest[i] <= limit[nearest[i]]) {
      for (int64_t t = 0; t < TRIALS; ++t) least[t * N + i] = closest[i];
      continue;
    }
    const float* point = points + i * D;
    Eight even[TRIALS] = {}, odd[TRIALS] = {};
    int64_t d = 0;
    for (; d + 2 * WIDTH <= D; d += 2 * WIDTH) {
      const Eight a = eight(point + d), b = eight(point + d + WIDTH);
      for (int64_t t = 0; t < TRIALS; ++t) {
        const Eight x = a - eight(row[t] + d), y = b - eight(row[t] + d + WIDTH);
        even[t] += x * x;
        odd[t] += y * y;
      }
    }
#pragma GCC unroll 4  // else the sums live in memory
    for (int64_t t = 0; t < TRIALS; ++t) {
      float sum = sum_of(even[t] + odd[t]);
      for (int64_t e = d; e < D; ++e) sum += (point[e] - row[t][e]) * (point[e] - row[t][e]);
      least[t * N + i] = sum < closest[i] ? sum : closest[i];
    }
  }
}

}  // namespace

CLMFAST_PER_ISA(void, least_dist2,
                (const float* points, int64_t N, int64_t D, const float* const* row, const float* closest,
                 const int32_t* nearest, const float* limit, float* least),
                (points, N, D, row, closest, nearest, limit, least))

void Centroids::pack(const float* centroid, int64_t K, int64_t D) {
  centroid_ = centroid, K_ = K, D_ = D, n_blocks_ = (K + GROUPS - 1) / GROUPS;
  const double steps = (static_cast<double>(D) + 8) * 0x1p-24;
  kappa_ = steps / (1 - steps), eta_ = (static_cast<double>(D) + 8) * 0x1p-118;
  // The frame: half the largest |coordinate| to 1, the mean to 0. Any would do.
  std::vector<char> is_finite(K);
  std::vector<double> mean(D);
  int64_t n_finite = 0;
  float reach = 0;
  for (int64_t k = 0; k < K; ++k) {
    const float of_row = row_reach(centroid + k * D, D);
    is_finite[k] = of_row < INF;
    if (!is_finite[k]) continue;
    ++n_finite;
    reach = std::max(reach, of_row);
    for (int64_t d = 0; d < D; ++d) mean[d] += centroid[k * D + d];
  }
  scale_ = reach > 0 ? std::ldexp(1.0f, std::clamp(-std::ilogb(reach) - 1, -126, 126)) : 1;
  centre_.resize(D);
  for (int64_t d = 0; d < D; ++d)
    centre_[d] = static_cast<float>(mean[d] / static_cast<double>(std::max<int64_t>(n_finite, 1)) * scale_);
  columns_.assign(n_blocks_ * D * GROUPS, 0);
  norm2_.assign(n_blocks_ * GROUPS, INF);
  largest_norm2_ = 0;
  for (int64_t k = 0; k < K; ++k) {
    if (!is_finite[k]) continue;
    float* column = columns_.data() + k / GROUPS * D * GROUPS + k % GROUPS;
    double norm2 = 0;
    for (int64_t d = 0; d < D; ++d) {
      const float x = centroid[k * D + d] * scale_ - centre_[d];
      column[d * GROUPS] = x;
      norm2 += static_cast<double>(x) * x;
    }
    norm2_[k] = static_cast<float>(norm2);
    largest_norm2_ = std::max(largest_norm2_, norm2);
  }
}

void Centroids::nearest(const float* points, const int64_t* row, int64_t n, const int32_t* excluded, int32_t* label,
                        float* within, float* beyond) const {
  constexpr float SUITABLE = 0x1p60f;  // squared norms up to here leave no room for overflow
  static const ScreenTile screen_tile = pick(screen_tile_baseline, screen_tile_avx2, screen_tile_avx512);
  const Screen screen{centre_.data(),
                      columns_.data(),
                      norm2_.data(),
                      D_,
                      n_blocks_,
                      (K_ - (n_blocks_ - 1) * GROUPS + WIDTH - 1) / WIDTH,
                      scale_,
                      static_cast<float>(kappa_),
                      static_cast<float>(eta_),
                      static_cast<float>(largest_norm2_)};
  const int64_t width = n_blocks_ * GROUPS;
  std::vector<float> memory(TILE * (D_ + width), INF);
  float *screened = memory.data(), *placed = screened + TILE * width;
  const float in_points = 1 / scale_;
  for (int64_t e = 0; e < n; e += TILE) {
    const int64_t n_rows = std::min(TILE, n - e);
    const float* point[TILE];
    int32_t without[TILE];
    Verdict verdict[TILE];
    for (int64_t r = 0; r < TILE; ++r) {
      point[r] = points + row[std::min(e + r, n - 1)] * D_;
      without[r] = excluded ? excluded[std::min(e + r, n - 1)] : -1;
    }
    for (int64_t r = e + TILE; r < std::min(n, e + 2 * TILE); ++r)  // the next tile's, on its way from a far cache
      for (int64_t d = 0; d < D_; d += 16) __builtin_prefetch(points + row[r] * D_ + d);
    screen_tile(screen, point, without, placed, screened, verdict);
    for (int64_t r = 0; r < n_rows; ++r) {
      const Verdict& found = verdict[r];
      const float* v = screened + r * width;
      float* groups = beyond ? beyond + (e + r) * GROUPS : nullptr;
      label[e + r] = found.label;
      if (found.norm2 <= SUITABLE && found.n_close == 1) {
        // The squared norm is another sum that may be off by kappa P^2.
        const float slack = 2 * found.slack;
        if (within) within[e + r] = std::sqrt(v[found.label] + found.norm2 + slack) * in_points * (1 + 0x1p-20f);
        if (groups) find_beyond(v, n_blocks_, found.label, found.norm2 - slack, in_points * (1 - 0x1p-20f), groups);
      } else if (is_finite_row(point[r], D_)) {
        const bool is_suitable = found.norm2 <= SUITABLE;
        decide(point[r], v, is_suitable ? found.limit : INF, found.norm2, is_suitable ? 2 * found.slack : INF,
               without[r], label[e + r], within ? within + e + r : nullptr, groups);
      } else {
        label[e + r] = -1;
        if (within) within[e + r] = 0;
        if (groups) std::fill_n(groups, GROUPS, INF);
      }
    }
  }
}

void Centroids::decide(const float* point, const float* screened, float limit, double offset, double slack,
                       int32_t excluded, int32_t& label, float* within, float* beyond) const {
  double least = std::numeric_limits<double>::infinity();
  std::vector<double> low(K_);
  label = 0;
  for (int64_t k = 0; k < K_; ++k) {
    if (k == excluded || !(norm2_[k] < INF)) {
      low[k] = std::numeric_limits<double>::infinity();
    } else if (!(screened[k] > limit)) {
      const double dist2 = pair_dist2(point, centroid_ + k * D_, D_);
      low[k] = std::sqrt(dist2);
      if (dist2 < least) {
        least = dist2;
        label = static_cast<int32_t>(k);
      }
    } else {
      low[k] = std::sqrt(std::max(screened[k] + offset - slack, 0.0)) / scale_;
    }
  }
  if (within) *within = static_cast<float>(std::sqrt(least) * (1 + 0x1p-20)) + 0x1p-120f;
  if (!beyond) return;
  std::fill_n(beyond, GROUPS, INF);
  for (int64_t k = 0; k < K_; ++k)
    if (k != label) beyond[k % GROUPS] = std::min(beyond[k % GROUPS], static_cast<float>(low[k] * (1 - 0x1p-20)));
}

Between Centroids::between(const float* point, int64_t k) const {
  const float dist2 = difference2(point, centroid_ + k * D_, D_);
  if (!(dist2 > 0x1p-80f && dist2 < 0x1p120f)) {
    const double dist = std::sqrt(pair_dist2(point, centroid_ + k * D_, D_));
    return {static_cast<float>(dist * (1 - 0x1p-20)), static_cast<float>(dist * (1 + 0x1p-20)) + 0x1p-120f};
  }
  const float error = static_cast<float>(D_ / 32 + 48) * 0x1p-24f, dist = std::sqrt(dist2);  // of the root, half of it
  return {dist * (1 - error), dist * (1 + error)};
}

void Centroids::renew(const float* point, uint32_t near, int32_t& label, float& within, float* beyond) const {
  const Between own = between(point, label);
  within = own.high;
  for (uint32_t rest = near; rest; rest &= rest - 1)
    if (own.high < beyond[__builtin_ctz(rest)]) near &= ~(rest & -rest);
  if (!near) return;

  // All that may be nearer.
  constexpr int64_t MOST = 64;
  int32_t rival[MOST];
  float low[MOST], least = own.high;
  rival[0] = label, low[0] = own.low;
  int64_t n = 1;
  for (uint32_t rest = near; rest; rest &= rest - 1) {
    for (int64_t k = __builtin_ctz(rest); k < K_; k += GROUPS) {
      if (k == label || !(norm2_[k] < INF)) continue;
      if (n == MOST) {
        const int64_t row = 0;
        return nearest(point, &row, 1, nullptr, &label, &within, beyond);
      }
      const Between other = between(point, k);
      rival[n] = static_cast<int32_t>(k), low[n] = other.low, ++n;
      least = std::min(least, other.high);
    }
  }
  within = least;
  int64_t n_close = 0, best = 0;
  for (int64_t e = 0; e < n; ++e)
    if (low[e] <= least) ++n_close, best = e;
  if (n_close > 1) {
    double best2 = std::numeric_limits<double>::infinity();
    best = -1;
    for (int64_t e = 0; e < n; ++e) {
      if (low[e] > least) continue;
      const double dist2 = pair_dist2(point, centroid_ + rival[e] * D_, D_);
      low[e] = static_cast<float>(std::sqrt(dist2) * (1 - 0x1p-20));
      if (best < 0 || dist2 < best2 || (dist2 == best2 && rival[e] < rival[best])) {
        best = e;
        best2 = dist2;
      }
    }
    within = static_cast<float>(std::sqrt(best2) * (1 + 0x1p-20)) + 0x1p-120f;
  }
  // The groups that were looked into are known anew, and that of the old label may have got it back.
  for (uint32_t rest = near; rest; rest &= rest - 1) beyond[__builtin_ctz(rest)] = INF;
  for (int64_t e = 0; e < n; ++e)
    if (e != best) beyond[rival[e] % GROUPS] = std::min(beyond[rival[e] % GROUPS], low[e]);
  label = rival[best];
}

}  // namespace clmfast
