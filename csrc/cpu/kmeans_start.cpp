// Where k-means starts: greedy k-means++, points drawn at random, or what the caller gives.
#include <algorithm>
#include <cmath>
#include <limits>

#include "centroids.h"
#include "isa.h"
#include "kmeans_run.h"
#include "pair.h"
#include "uniform.h"

namespace clmfast {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

std::vector<int64_t> finite_points(const Kmeans& op, const float* points) {
  std::vector<int64_t> finite;
  for (int64_t i = 0; i < op.N; ++i)
    if (is_finite_row(points + i * op.D, op.D)) finite.push_back(i);
  return finite;
}

constexpr int64_t WIDTH = 8;

// In one fixed order.
CLMFAST_BODY double total_body(const float* x, int64_t N) {
  double sum[WIDTH] = {};
  int64_t i = 0;
  for (; i + WIDTH <= N; i += WIDTH)
    for (int64_t l = 0; l < WIDTH; ++l) sum[l] += x[i + l];
  for (; i < N; ++i) sum[0] += x[i];
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

CLMFAST_PER_ISA(double, total, (const float* x, int64_t N), (x, N))

// Greedy k-means++ on float32 distances. Points whose squares would leave float32 are scaled by a power of two first.
void start_plus_plus(const Kmeans& op, const std::vector<int64_t>& finite, KmeansRun& run) {
  const int64_t N = op.N, D = op.D, K = op.K, n_trials = 2 + static_cast<int64_t>(std::log(static_cast<double>(K)));
  const float* points = run.points;
  float reach = 0;
  for (int64_t i : finite) reach = std::max(reach, row_reach(points + i * D, D));
  std::vector<float> scaled;
  if (reach > 0 && (reach > 0x1p40f || reach < 0x1p-20f)) {
    const int exponent = -std::ilogb(reach);
    scaled.resize(N * D);
    for (int64_t i = 0; i < N * D; ++i) scaled[i] = std::ldexp(points[i], exponent);
    points = scaled.data();
  }
  int64_t draw = 0;
  const int64_t n_finite = static_cast<int64_t>(finite.size());
  std::vector<int64_t> chosen{finite[static_cast<int64_t>(uniform(op.seed, run.s, run.restart, draw++) * n_finite)]};
  const Panels panels(points, N, D, chosen[0]);
  const int64_t stride = panels.stride(), n_rounds = (n_trials + TRIALS - 1) / TRIALS;
  // Not finite: at no distance from anything, so that none is ever drawn.
  std::vector<float> closest(stride, 0.0f), least(n_rounds * TRIALS * stride);
  std::vector<int32_t> nearest(N);  // of the chosen
  for (int64_t i : finite) closest[i] = panels.norm2()[i];
  auto measure = [&](const std::vector<int64_t>& trial) {
    for (int64_t first = 0; first < n_trials; first += TRIALS) {
      int64_t together[TRIALS];
      std::vector<float> limit(chosen.size(), INF);
      for (int64_t t = 0; t < TRIALS; ++t) {
        together[t] = trial[std::min(first + t, n_trials - 1)];
        // Half the way to the trial, less what float32 may have got wrong.
        for (size_t k = 0; k < chosen.size(); ++k) {
          const double dist2 = pair_dist2(points + chosen[k] * D, points + together[t] * D, D);
          limit[k] = std::min(limit[k], static_cast<float>(dist2 * (0.25 - 0x1p-5)));
        }
      }
      panels.least_dist2(together, closest.data(), nearest.data(), limit.data(), least.data() + first * stride);
    }
  };
  auto choose = [&](int64_t i, const float* dist2) {
    const int32_t k = static_cast<int32_t>(chosen.size());
    for (int64_t e = 0; e < N; ++e) nearest[e] = dist2[e] < closest[e] ? k : nearest[e];
    std::copy_n(dist2, N, closest.data());
    chosen.push_back(i);
  };
  std::vector<int64_t> trial(n_trials);
  double potential = total(closest.data(), N);

  while (static_cast<int64_t>(chosen.size()) < K) {
    if (potential == 0) {  // every point already lies on a centroid
      chosen.push_back(chosen.back());
      continue;
    }
    std::vector<double> target(n_trials);
    for (double& x : target) x = uniform(op.seed, run.s, run.restart, draw++) * potential;
    std::fill(trial.begin(), trial.end(), -1);
    double sum = 0;
    int64_t last = 0;
    for (int64_t i = 0; i < N; ++i) {
      if (closest[i] == 0) continue;
      sum += closest[i];
      last = i;
      for (int64_t t = 0; t < n_trials; ++t)
        if (trial[t] < 0 && sum > target[t]) trial[t] = i;
    }
    for (int64_t& i : trial)
      if (i < 0) i = last;
    measure(trial);
    int64_t best = -1;
    for (int64_t t = 0; t < n_trials; ++t) {
      const double sum_t = total(least.data() + t * stride, N);
      if (best < 0 || sum_t < potential) {
        best = t;
        potential = sum_t;
      }
    }
    choose(trial[best], least.data() + best * stride);
  }
  for (int64_t k = 0; k < K; ++k) std::copy_n(run.points + chosen[k] * D, D, run.centroid.data() + k * D);
}

void start_random(const Kmeans& op, std::vector<int64_t> deck, KmeansRun& run) {
  const int64_t D = op.D, n_finite = static_cast<int64_t>(deck.size());
  for (int64_t k = 0; k < op.K; ++k) {
    if (k < n_finite) std::swap(deck[k], deck[k + static_cast<int64_t>(uniform(op.seed, run.s, run.restart, k) * (n_finite - k))]);
    std::copy_n(run.points + deck[k % n_finite] * D, D, run.centroid.data() + k * D);
  }
}

void start_given(const Kmeans& op, KmeansRun& run) {
  const int64_t D = op.D;
  std::copy_n(op.init + run.s * op.K * D, op.K * D, run.centroid.data());
  for (int64_t k = 0; k < op.K; ++k) {
    if (is_finite_row(run.centroid.data() + k * D, D)) continue;
    std::vector<double> mean(D);
    const std::vector<int64_t> finite = finite_points(op, run.points);
    for (int64_t i : finite)
      for (int64_t d = 0; d < D; ++d) mean[d] += run.points[i * D + d];
    for (int64_t d = 0; d < D; ++d)
      run.centroid[k * D + d] = static_cast<float>(mean[d] / static_cast<double>(std::max<size_t>(finite.size(), 1)));
  }
}

}  // namespace

void kmeans_start(const Kmeans& op, KmeansRun& run) {
  if (op.init) return start_given(op, run);
  const std::vector<int64_t> finite = finite_points(op, run.points);
  if (finite.empty()) std::fill(run.centroid.begin(), run.centroid.end(), 0.0f);
  else if (op.start == KmeansStart::plus_plus) start_plus_plus(op, finite, run);
  else start_random(op, finite, run);
}

}  // namespace clmfast
