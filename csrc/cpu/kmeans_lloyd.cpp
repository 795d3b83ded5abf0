// Lloyd's algorithm on the CPU.
//
// Bounds on distances (Elkan 2003; by group of centroids, as in Ding et al. 2015) tell which labels may have changed, so
// that most points of most iterations meet no centroid. Sums are exact (sums.h): a point that changes its cluster
// leaves the one and enters the other, and no order shows in a result.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "centroids.h"
#include "isa.h"
#include "kmeans_run.h"
#include "pair.h"
#include "sums.h"

namespace clmfast {
namespace {

constexpr int64_t CHUNK = 256;  // points that one task labels
constexpr int64_t AHEAD = 3;    // scattered rows come from a far cache: asking for them early hides the way

int64_t n_chunks(int64_t N) { return (N + CHUNK - 1) / CHUNK; }

// Widens the bounds of n points by how far the centroids moved; bit g of near[i]: group g may have come nearer than the
// point's own centroid.
//   beyond [n_groups, stride]
CLMFAST_BODY void widen_bounds_body(const int32_t* label, int64_t n, int64_t n_groups, const float* move,
                                    const float* group_move, float* within, float* beyond, int64_t stride,
                                    uint32_t* near) {
  for (int64_t i = 0; i < n; ++i) {
    within[i] = (within[i] + move[std::max(label[i], 0)]) * (1 + 0x1p-22f);
    near[i] = 0;
  }
  for (int64_t g = 0; g < n_groups; ++g) {
    float* of_group = beyond + g * stride;
    for (int64_t i = 0; i < n; ++i) {
      of_group[i] = (of_group[i] - group_move[g]) * (1 - 0x1p-22f);
      near[i] |= within[i] < of_group[i] ? 0 : 1u << g;
    }
  }
}

CLMFAST_PER_ISA(void, widen_bounds,
                (const int32_t* label, int64_t n, int64_t n_groups, const float* move, const float* group_move,
                 float* within, float* beyond, int64_t stride, uint32_t* near),
                (label, n, n_groups, move, group_move, within, beyond, stride, near))

// A point that an empty cluster takes over from another, until the centroids have moved.
struct Taken {
  int64_t i;
  int32_t from, to;
};

class Lloyd {
 public:
  Lloyd(const Kmeans& op, KmeansRun& run, ParallelFor parallel_for)
      : op_(op), N_(op.N), D_(op.D), K_(op.K), n_groups_(std::min(op.K, GROUPS)), run_(run), label_(run.label),
        centroid_(run.centroid), parallel_for_(parallel_for), next_(K_ * D_), within_(N_), beyond_(n_groups_ * N_),
        reach_(n_chunks(N_) * D_), magic_(D_), sum_(K_ * D_), summed_(N_, -1), count_(K_), changes_(K_), move_(K_),
        group_move_(n_groups_), inertia_(n_chunks(N_)) {}

  void to_the_end() {
    for_chunks([this](int64_t chunk) { label_first(chunk); });
    set_quantum();
    bool is_consistent = false;  // is label that of centroid?
    for (bool is_active = true; is_active;) {
      const bool has_changed = sum_changed();
      const std::vector<Taken> taken = take_over();
      move_points(taken, 1);
      move_centroids();
      move_points(taken, -1);
      ++run_.n_iter;
      // Unchanged labels have the same means as before, so the centroids fit, unless an empty cluster took a point.
      is_consistent = !has_changed && taken.empty();
      is_active = has_changed && run_.n_iter < op_.max_iter && has_moved();
      if (is_active) for_chunks([this](int64_t chunk) { label_again(chunk, false); });
    }
    for_chunks([&](int64_t chunk) {
      if (!is_consistent) label_again(chunk, true);
      sum_inertia(chunk);
    });
    run_.inertia = std::accumulate(inertia_.begin(), inertia_.end(), 0.0);
  }

 private:
  template <class Task>
  void for_chunks(const Task& task) {
    packed_.pack(centroid_.data(), K_, D_);
    for_each(parallel_for_, n_chunks(N_), task);
  }

  const float* point(int64_t i) const { return run_.points + i * D_; }

  // ---- label

  Found found_of(int64_t i) { return Found{label_.data(), within_.data(), beyond_.data(), N_}.from(i); }

  void label_first(int64_t chunk) {
    int64_t row[CHUNK];
    const int64_t first = chunk * CHUNK, n = std::min(CHUNK, N_ - first);
    std::iota(row, row + n, first);
    std::vector<int32_t> bits(D_);
    packed_.nearest(run_.points, row, n, nullptr, found_of(first), bits.data());
    reach_of(point(first), n, D_, bits.data(), reach_.data() + chunk * D_);
  }

  // Labels the points of a chunk after the centroids moved. The last time, no bounds are needed any more.
  void label_again(int64_t chunk, bool is_last) {
    // With more near groups than these two, all centroids at once cost less than one by one.
    auto is_few = [](uint32_t groups) {
      for (int e = 0; e < 2; ++e) groups &= groups - 1;
      return groups == 0;
    };
    uint32_t near[CHUNK];
    int64_t row[CHUNK], one_by_one[CHUNK], n_rows = 0, n_one_by_one = 0;
    const int64_t first = chunk * CHUNK, n = std::min(CHUNK, N_ - first);
    widen_bounds(&label_[first], n, n_groups_, move_.data(), group_move_.data(), &within_[first], beyond_.data() + first, N_,
                 near);
    for (int64_t e = 0; e < n; ++e) {
      if (near[e] == 0) continue;
      if (is_few(near[e])) one_by_one[n_one_by_one++] = first + e;
      else row[n_rows++] = first + e;
    }
    for (int64_t e = 0; e < n_one_by_one; ++e) {
      if (e + AHEAD < n_one_by_one) prefetch_row(point(one_by_one[e + AHEAD]), D_);
      const int64_t i = one_by_one[e];
      packed_.renew(point(i), near[i - first], found_of(i));
    }
    if (n_rows > 0) label_anew(row, n_rows, is_last);
  }

  // Compares rows with all centroids.
  void label_anew(const int64_t* row, int64_t n, bool is_last) {
    int32_t label[CHUNK];
    float within[CHUNK], beyond[GROUPS * CHUNK];
    packed_.nearest(run_.points, row, n, nullptr,
                    {label, is_last ? nullptr : within, is_last ? nullptr : beyond, CHUNK});
    for (int64_t e = 0; e < n; ++e) label_[row[e]] = label[e];
    if (is_last) return;
    for (int64_t e = 0; e < n; ++e) within_[row[e]] = within[e];
    for (int64_t g = 0; g < n_groups_; ++g)
      for (int64_t e = 0; e < n; ++e) beyond_[g * N_ + row[e]] = beyond[g * CHUNK + e];
  }

  // ---- move

  // Chooses the quantum of the sums.
  void set_quantum() {
    std::vector<float> reach(D_);
    for (int64_t e = 0; e < n_chunks(N_); ++e)
      for (int64_t d = 0; d < D_; ++d) reach[d] = std::max(reach[d], reach_[e * D_ + d]);
    n_finite_ = N_ - std::count(label_.begin(), label_.end(), -1);
    find_magic(reach.data(), D_, n_finite_, magic_.data());
    double squares = 0;
    for (float x : reach) squares += static_cast<double>(x) * x;
    most_variance_ = squares / static_cast<double>(std::max<int64_t>(D_, 1));
  }

  // Brings the sums up to date with the labels. Returns whether any has changed.
  bool sum_changed() {
    for (auto& [enters, leaves] : changes_) enters.clear(), leaves.clear();
    bool has_changed = false;
    for (int64_t i = 0; i < N_; ++i) {
      const int32_t from = summed_[i], to = label_[i];
      if (from == to) continue;
      if (from >= 0) changes_[from].second.push_back(i);
      if (to >= 0) changes_[to].first.push_back(i);
      summed_[i] = to;
      has_changed = true;
    }
    for_each(parallel_for_, K_, [&](int64_t k) {
      const auto& [enters, leaves] = changes_[k];
      count_[k] += static_cast<int64_t>(enters.size()) - static_cast<int64_t>(leaves.size());
      for (int64_t i : leaves) add(i, -1, k);
      for (int64_t i : enters) add(i, 1, k);
    });
    return has_changed;
  }

  void add(int64_t i, double sign, int64_t k) { add_point(point(i), magic_.data(), sign, D_, sum_.data() + k * D_); }

  // The points farthest from their centroids, one for each empty cluster.
  std::vector<Taken> take_over() const {
    std::vector<int32_t> empty;
    for (int64_t k = 0; k < K_; ++k)
      if (count_[k] == 0) empty.push_back(static_cast<int32_t>(k));
    if (empty.empty()) return {};
    std::vector<std::pair<double, int64_t>> far;  // (-dist2, point): the farthest first, of equals the smaller index
    std::vector<double> dist2(N_);
    dist2_to_groups(run_.points, 0, N_, D_, label_.data(), centroid_.data(), dist2.data());
    for (int64_t i = 0; i < N_; ++i)
      if (dist2[i] > 0) far.emplace_back(-dist2[i], i);
    const size_t n = std::min(far.size(), empty.size());
    std::partial_sort(far.begin(), far.begin() + n, far.end());
    std::vector<Taken> taken;
    for (size_t e = 0; e < n; ++e) taken.push_back({far[e].second, label_[far[e].second], empty[e]});
    return taken;
  }

  void move_points(const std::vector<Taken>& taken, int64_t sign) {
    for (const Taken& t : taken) {
      add(t.i, static_cast<double>(-sign), t.from);
      add(t.i, static_cast<double>(sign), t.to);
      count_[t.from] -= sign;
      count_[t.to] += sign;
    }
  }

  void move_centroids() {
    moved2_ = 0;
    std::fill(group_move_.begin(), group_move_.end(), 0.0f);
    for (int64_t k = 0; k < K_; ++k) {
      const double n = static_cast<double>(count_[k]);
      for (int64_t d = 0; d < D_; ++d)
        next_[k * D_ + d] = n > 0 ? static_cast<float>(sum_[k * D_ + d] / n) : centroid_[k * D_ + d];
      const double move2 = pair_dist2(centroid_.data() + k * D_, next_.data() + k * D_, D_);
      moved2_ += move2;
      move_[k] = move2 > 0 ? static_cast<float>(std::sqrt(move2) * (1 + 0x1p-20) + 0x1p-120) : 0;
      group_move_[k % GROUPS] = std::max(group_move_[k % GROUPS], move_[k]);
    }
    std::swap(centroid_, next_);
  }

  // ---- stop

  // The mean over the coordinates of the variance of the points.
  double variance() const {
    const double n = static_cast<double>(std::max<int64_t>(n_finite_, 1));
    std::vector<double> mean(D_);
    for (int64_t i = 0; i < K_ * D_; ++i) mean[i % D_] += sum_[i] / n;
    const std::vector<float> centre(mean.begin(), mean.end());
    double squares = 0;
    for (int64_t i = 0; i < N_; ++i)
      if (label_[i] >= 0) squares += pair_dist2(point(i), centre.data(), D_);
    squares /= n;
    for (int64_t d = 0; d < D_; ++d) squares -= (mean[d] - centre[d]) * (mean[d] - centre[d]);
    return std::max(squares, 0.0) / static_cast<double>(std::max<int64_t>(D_, 1));
  }

  // Did the centroids move by more than tol? Mostly an upper bound of it is enough to tell, and saves a pass over the
  // points.
  bool has_moved() {
    if (moved2_ > op_.tol * most_variance_) return true;
    if (bound_ < 0) bound_ = op_.tol * variance();
    return moved2_ > bound_;
  }

  void sum_inertia(int64_t chunk) {
    const int64_t first = chunk * CHUNK, n = std::min(CHUNK, N_ - first);
    double dist2[CHUNK];
    dist2_to_groups(run_.points, first, n, D_, &label_[first], centroid_.data(), dist2);
    inertia_[chunk] = std::accumulate(dist2, dist2 + n, 0.0);
  }

  const Kmeans& op_;
  const int64_t N_, D_, K_, n_groups_;
  KmeansRun& run_;
  std::vector<int32_t>& label_;
  std::vector<float>& centroid_;
  ParallelFor parallel_for_;
  Centroids packed_;
  std::vector<float> next_;                 // [K, D]
  std::vector<float> within_;               // [N]: at least the distance to the own centroid
  std::vector<float> beyond_;               // [n_groups, N]: at most the distance to any other centroid of a group
  std::vector<float> reach_;                // [n_chunks, D]: the largest |coordinate| of each chunk
  std::vector<double> magic_, sum_;         // [D], [K, D] (sums.h)
  std::vector<int32_t> summed_;             // [N]: the cluster whose sum a point is in, or -1
  std::vector<int64_t> count_;              // [K]: points in each sum
  std::vector<std::pair<std::vector<int64_t>, std::vector<int64_t>>> changes_;  // [K]: who enters a sum, and who leaves
  std::vector<float> move_, group_move_;    // [K], [n_groups]: at least how far the centroids moved last
  std::vector<double> inertia_;             // [n_chunks]
  int64_t n_finite_ = 0;
  double most_variance_ = 0;                // at least the mean over the coordinates of the variance
  double moved2_ = 0;                       // of all centroids
  double bound_ = -1;                       // on moved2_, once it is known
};

}  // namespace

void kmeans_lloyd(const Kmeans& op, KmeansRun& run, ParallelFor parallel_for) {
  Lloyd(op, run, parallel_for).to_the_end();
}

}  // namespace clmfast
