// What one core can do at most: the yardstick beside every time. Compiled by machine.py for the machine it runs on.
#include <cstdint>

#ifdef __AVX512F__
constexpr int width = 16, n_chains = 24;  // 32 registers: enough chains in flight for two units of latency 4 and more
#else
constexpr int width = 8, n_chains = 12;  // 16 registers
#endif
typedef float Lanes __attribute__((vector_size(width * sizeof(float))));

// Multiply-adds in independent chains, nothing read or written; returns the number of floating-point operations.
extern "C" double multiply_add(int64_t n_rounds, float* sink) {
  Lanes chain[n_chains], scale, shift;
  for (int l = 0; l < width; l++) scale[l] = 0.999f, shift[l] = 1e-3f;
  for (auto& c : chain) c = shift;
  for (int64_t i = 0; i < n_rounds; i++) {
#pragma GCC unroll 24
    for (auto& c : chain) c = c * scale + shift;
  }
  Lanes sum = chain[0];
  for (int c = 1; c < n_chains; c++) sum += chain[c];
  *sink = sum[0];
  return 2.0 * width * n_chains * static_cast<double>(n_rounds);
}

// Reads n floats once, n a multiple of 4 * width.
extern "C" void read_all(const float* data, int64_t n, float* sink) {
  Lanes sum[4] = {};
  for (int64_t i = 0; i < n; i += 4 * width)
    for (int j = 0; j < 4; j++) sum[j] += *reinterpret_cast<const Lanes*>(data + i + j * width);
  const Lanes total = sum[0] + sum[1] + sum[2] + sum[3];
  *sink = total[0];
}
