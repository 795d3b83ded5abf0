// kmeans on the CPU: restarts of all sets, side by side or one after the other.
#include <algorithm>
#include <vector>

#include "kmeans_run.h"

namespace clmfast {
namespace {

void write_best(const Kmeans& op, int64_t s, const std::vector<KmeansRun>& runs) {
  const auto first = runs.begin() + s * op.n_init;
  const auto best = std::min_element(first, first + op.n_init, [](const KmeansRun& a, const KmeansRun& b) {
    return a.inertia < b.inertia;
  });
  std::copy_n(best->label.begin(), op.N, op.label + s * op.N);
  std::copy(best->centroid.begin(), best->centroid.end(), op.centroid + s * op.K * op.D);
  op.inertia[s] = best->inertia;
  op.n_iter[s] = best->n_iter;
}

}  // namespace

void kmeans_cpu(const Kmeans& op, ParallelFor parallel_for) {
  std::vector<KmeansRun> runs;
  for (int64_t s = 0; s < op.S; ++s)
    for (int64_t restart = 0; restart < op.n_init; ++restart) runs.emplace_back(op, s, restart);
  const int64_t n_runs = static_cast<int64_t>(runs.size());
  // As many runs as there are threads go side by side, so that the points of each stay in a core's cache. Where that
  // would leave half of the threads idle, the phases of the last runs are split instead.
  const int64_t threads = n_threads(parallel_for), n_left = n_runs % threads;
  const int64_t n_whole = 2 * n_left > threads ? n_runs : n_runs - n_left;
  for_each(parallel_for, n_whole, [&](int64_t i) {
    kmeans_start(op, runs[i]);
    kmeans_lloyd(op, runs[i], in_line);
  });
  for_each(parallel_for, n_runs - n_whole, [&](int64_t i) { kmeans_start(op, runs[n_whole + i]); });
  for (int64_t i = n_whole; i < n_runs; ++i) kmeans_lloyd(op, runs[i], parallel_for);
  for (int64_t s = 0; s < op.S; ++s) write_best(op, s, runs);
}

}  // namespace clmfast
