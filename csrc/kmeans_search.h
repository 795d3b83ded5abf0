// kmeans_search: k-means partitions of low inertia, for S point sets at once: the best one and what came close to it.
//
//   points   [S, N, D] float32
//   known    [P, S, N] int64, or null: partitions to go on from, labels in [0, K); any other value: a point that belongs
//            to no cluster yet
//   n_cold   [S] int64: how many partitions of each set begin with k-means++
//   label    [keep, S, N] int64: the partitions found, of lowest inertia first; -1 for points that are not finite, and
//            for all where fewer were found
//   inertia  [keep, S] float64: sum over points of dist2 to the mean of their cluster; infinity where fewer were found
//   centroid [S, K, D] float32: means of the first partition's clusters, NaN where one has no points
//   n_iter   [S] int64: iterations of Lloyd's algorithm in all D dimensions that the best partition went through at the
//            end, at most max_iter; the last changed nothing if there were fewer
//   origin   [S] int64: the start that the first partition comes from: p of known [p], P + i for the i-th cold one,
//            P + n_cold[s] + i for the i-th renewal
//
//   directions [S, 1 + M, D], projected [S, N, M] float32, or null: the projection, M = n_directions(N, D, K), kept
//            from call to call. Written whole for sets that have a cold start, or nothing known, or directions of 0.
//            Else read, and `projected` written where the first known label is negative: all other points must be those
//            of the last call
//
// Search     takes place in a projection onto main directions of the points, where an iteration costs a fraction and
//            hardly a partition changes its rank. Known partitions first go on by Lloyd's algorithm (those without any
//            label are left out, but for the first); the best of them, and one other (number `seed` of them, round and
//            round), try moves. So does every cold start, and every renewal after them.
// Renewal    The best partition so far, a fifth of whose clusters, drawn at random, begin anew by k-means++, at points
//            that are far from its centroids; then Lloyd's algorithm. If its inertia is lower than the best
//            by more than SAME, another one follows, at most `renewals`.
// Moves      A round splits every cluster by 2-means of its own points, from the point farthest from the centroid and the
//            one farthest from that. The split of largest worth n_a n_b / (n_a + n_b) |a - b|^2 is made, the pair whose
//            union costs least by the same measure (Ward 1963), without the split cluster, is merged, and a few
//            iterations of Lloyd's algorithm follow. What lowers the inertia stands, and a new round begins; the first
//            move that does not is the last. At most `moves` rounds.
// Iterations compare points with the clusters that changed in the iteration before alone; after a move with the three
//            that it changed, and members of these with all.
// Inertia    of the first partition is that of all D dimensions, of others what the projection estimates, in which
//            partitions whose inertia differs by less than SAME of it count as one.
// Result     the same bits for any number of threads. Between instruction sets rounding may lead the search elsewhere.
// Limits     those of kmeans.h; P <= keep < 2^20.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace clmfast {

// How many directions points [N, D] are projected onto for K clusters; 0: they are left as they are.
constexpr int64_t n_directions(int64_t N, int64_t D, int64_t K) {
  const int64_t M = (2 * K + 8 + 7) / 8 * 8;
  return 2 * M <= D && 2 * M <= N ? M : 0;
}

struct KmeansSearch {
  const float* points;
  const int64_t* known;
  const int64_t* n_cold;
  int64_t S, N, D, K, P, keep, moves, renewals, max_iter, seed;
  float *directions = nullptr, *projected = nullptr;
  int64_t* label;
  double* inertia;
  float* centroid;
  int64_t* n_iter;
  int64_t* origin;
};

void kmeans_search_cpu(const KmeansSearch& op, ParallelFor parallel_for);

}  // namespace clmfast
