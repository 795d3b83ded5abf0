// majority_vote and label_shares on the GPU; the contract is ../votes.h.
#include "../votes.h"
#include "launch.cuh"
#include "members.cuh"
#include "ptx.cuh"

namespace clmfast {
namespace {

constexpr int THREADS = 128;        // four warps, each with a query of its own. Not tuned yet
constexpr int SHARES_THREADS = 256;  // of a block, which has a set and a label of its own. Not tuned yet

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

struct Shares {
  int n_counted;
  Members<SHARES_THREADS> members;
  double share[Members<SHARES_THREADS>::AT_ONCE];
};

// One block per set and label: it looks for the label's queries, finds each one's share in a thread of its own, and lets
// one thread add them up in their order, so that the sum has the CPU's bits.
__global__ void __launch_bounds__(SHARES_THREADS)
    shares_kernel(Neighbours near, const int64_t* truth, int64_t n_labels, double* out) {
  Shares& shares = static_shared<Shares>();
  const int64_t i_sum = blockIdx.x, s = i_sum / n_labels, c = i_sum % n_labels;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) shares.n_counted = 0;
  double sum = 0;
  for (int64_t first = 0; first < near.Q; first += shares.members.AT_ONCE) {
    const int n_queries = shares.members.find(first, near.Q, [=](int64_t q) { return truth[q] == c; });
    for (int e = thread; e < n_queries; e += SHARES_THREADS) {
      const int64_t* index = near.index + (s * near.Q + first + shares.members.item[e]) * near.k;
      int n = 0, n_same = 0;
#pragma unroll 8
      for (int64_t i = 0; i < near.k; ++i) {
        const int64_t point = index[i];
        if (!is_neighbour(near, point)) continue;
        ++n;
        n_same += near.label[point] == c;
      }
      shares.share[e] = n ? static_cast<double>(n_same) / static_cast<double>(n) : 0;  // adding 0 changes no sum
      if (n > 0) atomicAdd(&shares.n_counted, 1);
    }
    __syncthreads();
    if (thread == 0) {
#pragma unroll 8
      for (int e = 0; e < n_queries; ++e) sum += shares.share[e];
    }
  }
  if (thread == 0) out[i_sum] = sum, out[near.S * n_labels + i_sum] = shares.n_counted;
}

unsigned blocks_for(int64_t n_warps) { return static_cast<unsigned>((n_warps + THREADS / 32 - 1) / (THREADS / 32)); }

}  // namespace

void majority_vote_cuda(const Neighbours& near, int64_t* voted, CudaStream stream) {
  if (near.S * near.Q == 0) return;
  launch(majority_kernel, blocks_for(near.S * near.Q), THREADS, 0, stream, near, voted);
}

void label_shares_cuda(const Neighbours& near, const int64_t* truth, int64_t n_labels, double* out, CudaStream stream) {
  if (near.S * n_labels == 0) return;
  launch(shares_kernel, static_cast<unsigned>(near.S * n_labels), SHARES_THREADS, 0, stream, near, truth, n_labels, out);
}

}  // namespace clmfast
