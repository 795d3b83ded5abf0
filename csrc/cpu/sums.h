// What kmeans and separation sum over points: coordinates by group, and distances to the own group's centroid.
#pragma once

#include <cstdint>

namespace clmfast {

// dist2[e] (cpu/pair.h) of points[first + e] to the centroid of group[e], for n points; 0 where the group is negative.
void dist2_to_groups(const float* points, int64_t first, int64_t n, int64_t D, const int32_t* group,
                     const float* centroid, double* dist2);

// sum [K, D]: of the points of each group, in their order; points of a negative group are left out.
void sum_groups(const float* points, int64_t N, int64_t D, const int32_t* group, double* sum);

// Adds the coordinates of a row to sum [D].
void add_row(const float* row, int64_t D, double* sum);

// Sums that do not depend on the order of adding: every coordinate is first rounded to a multiple of a quantum, of which
// N times the largest coordinate of its column are at most 2^52 (and at least 2^43), so that float64 sums are exact.
//   magic [D]: 1.5 * 2^52 quanta; adding and subtracting it rounds. A pure function of the points
void find_magic(const float* reach, int64_t D, int64_t N, double* magic);

// reach [D]: the largest |coordinate| of those rows of points [n, D] that are finite; bits [D] are those of all rows.
void reach_of(const float* points, int64_t n, int64_t D, const int32_t* bits, float* reach);

// Adds `sign` times the rounded point to sum [D].
void add_point(const float* point, const double* magic, double sign, int64_t D, double* sum);

}  // namespace clmfast
