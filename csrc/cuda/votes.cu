// majority_vote and label_shares on the GPU; the contract is ../votes.h.
#include "../votes.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace clmfast {
namespace {

constexpr int THREADS = 128;  // four warps, each with a query or a label of its own. Not tuned yet

__device__ bool is_neighbour(const Neighbours& near, int64_t i) {
  return static_cast<uint64_t>(i) < static_cast<uint64_t>(near.N);
}

// A query's k neighbours, 32 at a time: lane l holds the label of neighbour first + l, if there is one.
struct Ballot {
  int64_t label;
  bool votes;

  __device__ Ballot(const Neighbours& near, const int64_t* index, int64_t first) : label(-1), votes(false) {
    const int64_t e = first + lane_id();
    if (e >= near.k || !is_neighbour(near, index[e])) return;
    label = near.label[index[e]];
    votes = true;
  }
};

// One warp per query: how many carry the label of the first, the second, ... neighbour; the first to have most wins.
__global__ void __launch_bounds__(THREADS) majority_kernel(Neighbours near, int64_t* voted) {
  const int64_t q = static_cast<int64_t>(blockIdx.x) * (THREADS / 32) + warp_id();
  if (q >= near.S * near.Q) return;
  const int64_t* index = near.index + q * near.k;
  int64_t best = -1;
  int most = 0;
  for (int64_t first = 0; first < near.k; first += 32) {
    const Ballot asked(near, index, first);
    for (uint32_t left = warp_ballot(asked.votes); left; left &= left - 1) {
      const int64_t label = warp_shuffle(asked.label, __ffs(static_cast<int>(left)) - 1);
      int n_votes = 0;
      for (int64_t other = 0; other < near.k; other += 32) {
        const Ballot counted = other == first ? asked : Ballot(near, index, other);
        n_votes += __popc(warp_ballot(counted.votes && counted.label == label));
      }
      if (n_votes > most) most = n_votes, best = label;
    }
  }
  if (lane_id() == 0) voted[q] = best;
}

// One warp per set and label: it looks for the label's queries, 32 at a time, and adds up their shares in their order, so
// that the sum has the CPU's bits.
__global__ void __launch_bounds__(THREADS)
    shares_kernel(Neighbours near, const int64_t* truth, int64_t n_labels, double* out) {
  const int64_t i_sum = static_cast<int64_t>(blockIdx.x) * (THREADS / 32) + warp_id();
  if (i_sum >= near.S * n_labels) return;
  const int64_t s = i_sum / n_labels, c = i_sum % n_labels;
  double sum = 0, count = 0;
  for (int64_t first = 0; first < near.Q; first += 32) {
    const int64_t q = first + lane_id();
    int64_t n = 0, n_same = 0;
    if (q < near.Q && truth[q] == c) {
      const int64_t* index = near.index + (s * near.Q + q) * near.k;
      for (int64_t e = 0; e < near.k; ++e) {
        if (!is_neighbour(near, index[e])) continue;
        ++n;
        n_same += near.label[index[e]] == c;
      }
    }
    const double share = n ? static_cast<double>(n_same) / static_cast<double>(n) : 0;
    for (uint32_t left = warp_ballot(n > 0); left; left &= left - 1) {
      sum += warp_shuffle(share, __ffs(static_cast<int>(left)) - 1);
      ++count;
    }
  }
  if (lane_id() == 0) out[i_sum] = sum, out[near.S * n_labels + i_sum] = count;
}

unsigned blocks_for(int64_t n_warps) { return static_cast<unsigned>((n_warps + THREADS / 32 - 1) / (THREADS / 32)); }

}  // namespace

void majority_vote_cuda(const Neighbours& near, int64_t* voted, CudaStream stream) {
  if (near.S * near.Q == 0) return;
  launch(majority_kernel, blocks_for(near.S * near.Q), THREADS, 0, stream, near, voted);
}

void label_shares_cuda(const Neighbours& near, const int64_t* truth, int64_t n_labels, double* out, CudaStream stream) {
  if (near.S * n_labels == 0) return;
  launch(shares_kernel, blocks_for(near.S * n_labels), THREADS, 0, stream, near, truth, n_labels, out);
}

}  // namespace clmfast
