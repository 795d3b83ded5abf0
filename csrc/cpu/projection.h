// Projection of the points of one set onto their main directions, approximately the first principal components: what a
// search that needs no exact distances works with.
//
//   row = directions . (x - centre)
//
// Directions are rows of a sample after a step of the power iteration towards the main subspace, made orthonormal.
#pragma once

#include <cstdint>
#include <vector>

namespace clmfast {

constexpr int64_t SIDE = 8;  // widths of rows are a multiple of this

// centre [D]: the mean of the finite points [N, D]; directions [M, D], each of the length that is returned, or 0 where
// points fill fewer dimensions. M <= D, a multiple of SIDE; 0: only the centre. The length is a power of two that brings
// the largest coordinate near 1, so that squares are float32.
float main_directions(const float* points, int64_t N, int64_t D, int64_t M, float* centre, float* directions);

// rows [N, M] of points [N, D]: a pure function of each point.
void project(const float* points, int64_t N, int64_t D, const float* centre, const float* directions, int64_t M,
             float* rows);

}  // namespace clmfast
