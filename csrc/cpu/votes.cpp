#include "../votes.h"

#include <algorithm>
#include <atomic>
#include <vector>

namespace clmfast {

bool majority_vote_cpu(const Neighbours& near, int64_t* voted, ParallelFor parallel_for) {
  std::atomic<bool> is_in_range{true};
  for_each(parallel_for, near.S, [&](int64_t s) {
    std::vector<int64_t> label(near.k);
    for (int64_t q = s * near.Q; q < (s + 1) * near.Q; ++q) {
      int64_t n = 0;
      for (int64_t e = 0; e < near.k; ++e) {
        const int64_t i = near.index[q * near.k + e];
        if (i < -1 || i >= near.N) is_in_range = false;
        else if (i >= 0) label[n++] = near.label[i];
      }
      voted[q] = -1;
      int64_t most = 0;
      for (int64_t e = 0; n - e > most; ++e) {  // what came before has been counted, and what is left must be enough
        const int64_t votes = std::count(label.begin() + e, label.begin() + n, label[e]);
        if (votes <= most) continue;
        most = votes;
        voted[q] = label[e];
      }
    }
  });
  return is_in_range;
}

bool label_shares_cpu(const Neighbours& near, const int64_t* truth, int64_t n_labels, double* out,
                      ParallelFor parallel_for) {
  for (int64_t q = 0; q < near.Q; ++q)
    if (truth[q] < 0 || truth[q] >= n_labels) return false;
  // Place i + 1 for point i, and one for no neighbour that no query is like.
  std::vector<int64_t> label(near.N + 1, -1);
  std::copy_n(near.label, near.N, label.begin() + 1);
  std::atomic<bool> is_in_range{true};
  for_each(parallel_for, near.S, [&](int64_t s) {
    double* share = out + s * n_labels;
    double* count = share + near.S * n_labels;
    std::fill_n(share, n_labels, 0.0);
    std::fill_n(count, n_labels, 0.0);
    uint64_t largest = 0;
    for (int64_t q = 0; q < near.Q; ++q) {
      const int64_t* index = near.index + (s * near.Q + q) * near.k;
      int64_t n = 0, n_same = 0;
      for (int64_t e = 0; e < near.k; ++e) {
        const uint64_t place = static_cast<uint64_t>(index[e]) + 1;
        largest = std::max(largest, place);
        n += place > 0;
        n_same += label[std::min<uint64_t>(place, near.N)] == truth[q];
      }
      if (n == 0) continue;
      share[truth[q]] += static_cast<double>(n_same) / static_cast<double>(n);
      ++count[truth[q]];
    }
    if (largest > static_cast<uint64_t>(near.N)) is_in_range = false;
  });
  return is_in_range;
}

}  // namespace clmfast
