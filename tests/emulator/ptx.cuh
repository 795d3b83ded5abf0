// Stands in for csrc/cuda/ptx.cuh: the same functions, by plain loops over what all threads of a warp brought, in the
// register layouts that the PTX ISA documents.
#pragma once

#include <array>

#include "half.h"

namespace emulator {

// ---- warps

template <class T>
struct Shuffled {
  T x;
  int from;
};

// x of lane `from`; poison where no thread runs.
template <class T>
T shuffle_from(const char* what, T x, int from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "");
  Shuffled<T> mine{x, from};
  meet_warp(what, mine, [](Shuffled<T>** slot) {
    std::array<T, 32> brought;
    std::memset(&brought, poison(), sizeof brought);
    for (int lane = 0; lane < 32; ++lane)
      if (slot[lane]) brought[lane] = slot[lane]->x;
    for (int lane = 0; lane < 32; ++lane)
      if (slot[lane]) slot[lane]->x = brought[slot[lane]->from];
  });
  return mine.x;
}

inline uint32_t vote(const char* what, bool holds) {
  uint32_t mine = holds;
  meet_warp(what, mine, [](uint32_t** slot) {
    uint32_t votes = 0;
    for (int lane = 0; lane < 32; ++lane)
      if (slot[lane]) votes |= *slot[lane] << lane;
    for (int lane = 0; lane < 32; ++lane)
      if (slot[lane]) *slot[lane] = votes;
  });
  return mine;
}

// ---- cp.async: what it will bring is poison until it has been waited for

inline void cp_async(void* to, const void* from, int n_bytes, int n_all) {
  require_aligned(to, n_all, "cp_async");
  if (n_bytes) require_aligned(from, n_all, "cp_async");
  if (n_bytes < 0 || n_bytes > n_all) fail("cp_async: more bytes than it can copy");
  shared_offset(to);
  std::memset(to, poison(), n_all);
  self->copies.back().push_back({to, from, n_bytes, n_all});
}

// ---- sums of the tensor cores

// c + sum of products as a tensor core may at worst give it: of all terms the bits are cut off that lie below the 24th
// from the largest term's first, and the sum is cut to a float32. (So measured of the first generation by Fasi, Higham,
// Mikaitis and Pranesh, 2021; later ones keep more.)
inline float tensor_sum(const double* product, int n, float c) {
  auto exponent = [](double x) { return static_cast<int>(emulator_bits<uint64_t>(x) >> 52 & 0x7ff); };
  int largest = exponent(c);
  for (int i = 0; i < n; ++i) largest = std::max(largest, exponent(product[i]));
  if (largest == 0x7ff) {
    double sum = c;
    for (int i = 0; i < n; ++i) sum += product[i];
    return static_cast<float>(sum);
  }
  if (largest < 64) return 0;
  const double quantum = emulator_bits<double>(static_cast<uint64_t>(largest - 23) << 52);  // terms < 2^24 quanta
  int64_t sum = static_cast<int64_t>(c / quantum);
  for (int i = 0; i < n; ++i) sum += static_cast<int64_t>(product[i] / quantum);
  const double exact = static_cast<double>(sum) * quantum;
  const float rounded = static_cast<float>(exact);
  return std::fabs(static_cast<double>(rounded)) > std::fabs(exact) ? std::nextafter(rounded, 0.0f) : rounded;
}

inline float bf16_of(uint32_t bits) { return float_of_bf16(static_cast<uint16_t>(bits)); }
inline float fp16_of(uint32_t bits) { return float_of_fp16(static_cast<uint16_t>(bits)); }
inline float tf32_of(uint32_t bits) { return emulator_bits<float>(bits & 0xffffe000); }

// ---- mma.sync

struct Matrices {
  const void* row;
  uint32_t r[4];
};

inline void load_matrices(const char* what, uint32_t* r, const void* shared_row, int n, bool is_transposed) {
  Matrices mine{shared_row, {}};
  if (self->lane() < 8 * n) {
    require_aligned(shared_row, 16, what);
    shared_offset(shared_row);
  }
  meet_whole_warp(what, mine, [n, is_transposed](Matrices** slot) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < n; ++m)
        for (int half = 0; half < 2; ++half) {
          const int row = is_transposed ? lane % 4 * 2 + half : lane / 4;
          const int column = is_transposed ? lane / 4 : lane % 4 * 2 + half;
          const uint16_t element = static_cast<const uint16_t*>(slot[8 * m + row]->row)[column];
          slot[lane]->r[m] |= static_cast<uint32_t>(element) << 16 * half;
        }
  });
  std::copy_n(mine.r, n, r);
}

struct Fragments {
  const uint32_t *a, *b;
  const float* c;
  float d[4];
};

// The warp's product of A 16 x K and B K x 8, given where an element lies and what its bits mean.
template <int K, class OfA, class OfB>
void multiply(const char* what, float* d, const uint32_t* a, const uint32_t* b, const float* c, OfA of_a, OfB of_b) {
  Fragments mine{a, b, c, {}};
  meet_whole_warp(what, mine, [of_a, of_b](Fragments** slot) {
    double A[16][K], B[K][8], product[K];
    for (int k = 0; k < K; ++k) {
      for (int row = 0; row < 16; ++row) A[row][k] = of_a(slot, row, k);
      for (int column = 0; column < 8; ++column) B[k][column] = of_b(slot, k, column);
    }
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column) {
        for (int k = 0; k < K; ++k) product[k] = A[row][k] * B[k][column];
        Fragments& at = *slot[row % 8 * 4 + column / 2];
        const int i = row / 8 * 2 + column % 2;
        at.d[i] = tensor_sum(product, K, at.c[i]);
      }
  });
  std::copy_n(mine.d, 4, d);
}
template <float (*of_bits)(uint32_t)>
void mma_16(const char* what, float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  multiply<16>(
      what, d, a, b, c,
      [](Fragments** slot, int row, int k) {
        return of_bits(slot[row % 8 * 4 + k % 8 / 2]->a[row / 8 + k / 8 * 2] >> 16 * (k % 2));
      },
      [](Fragments** slot, int k, int column) {
        return of_bits(slot[column * 4 + k % 8 / 2]->b[k / 8] >> 16 * (k % 2));
      });
}

// ---- wgmma: done at the wait, on what shared memory holds then; d is poison in between

// Element k < 16 of a row of what is described.
inline uint16_t described(uint64_t descriptor, int row, int k) {
  auto bytes = [descriptor](int shift) { return (descriptor >> shift & 0x3fff) << 4; };
  const uint64_t begin = bytes(0), k_block = bytes(16), row_block = bytes(32);
  uint64_t at = begin + row / 8 * row_block;
  if (descriptor >> 62 == 0) {
    at += k / 8 * k_block + row % 8 * 16 + k % 8 * 2;
  } else {
    const int width = descriptor >> 62 == 1 ? 128 : descriptor >> 62 == 2 ? 64 : 32;
    at += row % 8 * width + k * 2;
    at ^= (at >> 7 & (width / 16 - 1)) << 4;  // of the address itself, so blocks must be aligned
  }
  uint16_t element;
  std::memcpy(&element, self->block->shared + at, 2);
  return element;
}

inline void meet_for_wgmma(const char* what) {
  int nothing = 0;
  meet_whole_warp(what, nothing, [](int**) {});
}

template <float (*of_bits)(uint32_t), int N, class OfA>
void wgmma(float (&d)[N / 2], uint64_t b, bool is_added, OfA of_a) {
  static_assert(N == 64 || N == 128 || N == 256, "");
  Fiber& thread = *self;
  meet_for_wgmma("wgmma");
  if (settings.capability != 90) return fail("wgmma on a device that has none");
  if (!thread.is_fenced) return fail("wgmma without wgmma_fence");
  auto is_d = [&d](const auto& sum) { return sum.first == d; };
  if (std::none_of(thread.sums.begin(), thread.sums.end(), is_d)) {
    thread.sums.push_back({d, std::vector<float>(d, d + N / 2)});
    std::memset(d, poison(), sizeof d);
  }
  const int row = static_cast<int>(thread.linear / 32 % 4) * 16 + thread.lane() / 4, pair = thread.lane() % 4 * 2;
  thread.wgmmas.back().push_back({d, N / 2, [=](float* sum) {
    double A[2][16], product[16];
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 16; ++k) A[half][k] = of_bits(of_a(row + 8 * half, k));
    for (int i = 0; i < N / 2; ++i) {
      for (int k = 0; k < 16; ++k)
        product[k] = A[i / 2 % 2][k] * of_bits(described(b, i / 4 * 8 + pair + i % 2, k));
      sum[i] = tensor_sum(product, 16, is_added ? sum[i] : 0);
    }
  }});
}
template <float (*of_bits)(uint32_t), int N>
void wgmma_shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool is_added) {
  wgmma<of_bits, N>(d, b, is_added, [a](int row, int k) { return described(a, row, k); });
}

// The fragments of the warp's 16 rows.
struct RowFragments {
  uint32_t a[4];
  std::array<std::array<uint16_t, 16>, 16> rows;
};

template <float (*of_bits)(uint32_t), int N>
void wgmma_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool is_added) {
  RowFragments mine{{a[0], a[1], a[2], a[3]}, {}};
  meet_whole_warp("wgmma", mine, [](RowFragments** slot) {
    std::array<std::array<uint16_t, 16>, 16> rows;
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k)
        rows[row][k] =
            static_cast<uint16_t>(slot[row % 8 * 4 + k % 8 / 2]->a[row / 8 + k / 8 * 2] >> 16 * (k % 2));
    for (int lane = 0; lane < 32; ++lane) slot[lane]->rows = rows;
  });
  wgmma<of_bits, N>(d, b, is_added, [rows = mine.rows](int row, int k) { return rows[row % 16][k]; });
}

// ---- mbarrier and bulk copies, which are done when somebody waits for them

struct MbarrierState {
  uint16_t n_arrivals, n_left, phase;
  int16_t n_copies;  // expected bytes are counted as the copies that bring them, in units of 16
};
inline MbarrierState& state_of(uint64_t* barrier) {
  static_assert(sizeof(MbarrierState) == sizeof(uint64_t), "");
  shared_offset(barrier);
  return *reinterpret_cast<MbarrierState*>(barrier);
}
inline void end_phase_if_complete(MbarrierState& state) {
  if (state.n_left || state.n_copies) return;
  state.phase ^= 1;
  state.n_left = state.n_arrivals;
}

}  // namespace emulator

namespace clmfast {

// ---- shared memory

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulator::self->block->shared);
}
template <class T>
T& static_shared() {
  return emulator::static_shared<T>();
}
inline uint32_t shared_address(const void* shared) { return static_cast<uint32_t>(emulator::shared_offset(shared)); }

// ---- warps

inline int lane_id() { return static_cast<int>(threadIdx.x & 31); }
inline int warp_id() { return static_cast<int>(threadIdx.x >> 5); }

template <class T>
T warp_shuffle(T x, int lane) {
  return emulator::shuffle_from("warp_shuffle", x, lane & 31);
}
template <class T>
T warp_shuffle_xor(T x, int mask) {
  return emulator::shuffle_from("warp_shuffle_xor", x, (emulator::self->lane() ^ mask) & 31);
}
template <class T>
T warp_shuffle_down(T x, int delta) {
  const int lane = emulator::self->lane();
  return emulator::shuffle_from("warp_shuffle_down", x, lane + delta < 32 ? lane + delta : lane);
}
template <class T>
T warp_shuffle_up(T x, int delta) {
  const int lane = emulator::self->lane();
  return emulator::shuffle_from("warp_shuffle_up", x, lane - delta >= 0 ? lane - delta : lane);
}

inline uint32_t warp_ballot(bool holds) { return emulator::vote("warp_ballot", holds); }
inline bool warp_any(bool holds) { return emulator::vote("warp_any", holds) != 0; }
inline bool warp_all(bool holds) { return emulator::vote("warp_all", !holds) == 0; }
inline uint32_t warp_match_any(uint32_t x) {
  uint32_t mine = x;
  emulator::meet_warp("warp_match_any", mine, [](uint32_t** slot) {
    uint32_t equal[32] = {};
    for (int a = 0; a < 32; ++a)
      for (int b = 0; b < 32; ++b)
        if (slot[a] && slot[b] && *slot[a] == *slot[b]) equal[a] |= uint32_t{1} << b;
    for (int lane = 0; lane < 32; ++lane)
      if (slot[lane]) *slot[lane] = equal[lane];
  });
  return mine;
}

template <class T, class F>
T warp_reduce(T x, const F& combine) {
  for (int mask = 16; mask > 0; mask /= 2) x = combine(x, warp_shuffle_xor(x, mask));
  return x;
}
template <class T>
T warp_sum(T x) {
  return warp_reduce(x, [](T a, T b) { return a + b; });
}
template <class T>
T warp_max(T x) {
  return warp_reduce(x, [](T a, T b) { return a < b ? b : a; });
}
template <class T>
T warp_min(T x) {
  return warp_reduce(x, [](T a, T b) { return b < a ? b : a; });
}

inline void compute_here(int&) {}

inline void barrier_sync(int barrier, int n_threads) {
  if (barrier < 1 || barrier > 15 || n_threads % 32) emulator::fail("barrier_sync: 1..15, of whole warps");
  emulator::meet(emulator::self->block->named[barrier], n_threads, "barrier_sync");
}

inline void add_global(double* to, double x) { atomicAdd(to, x); }
inline void add_global(int32_t* to, int32_t x) { atomicAdd(to, x); }

// ---- cp.async: what it will bring is poison until it has been waited for

inline void cp_async_16(void* to_shared, const void* from) { emulator::cp_async(to_shared, from, 16, 16); }
inline void cp_async_16(void* to_shared, const void* from, int n_bytes) { emulator::cp_async(to_shared, from, n_bytes, 16); }
inline void cp_async_4(void* to_shared, const void* from, bool has_it = true) {
  emulator::cp_async(to_shared, from, has_it ? 4 : 0, 4);
}
inline void cp_async_commit() { emulator::self->copies.emplace_back(); }
template <int N>
void cp_async_wait() {
  auto& groups = emulator::self->copies;
  while (groups.size() > N + 1) {
    for (const emulator::Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, copy.n_bytes);
      std::memset(static_cast<char*>(copy.to) + copy.n_bytes, 0, copy.n_all - copy.n_bytes);
    }
    groups.pop_front();
  }
}

// ---- mma.sync

inline void ldmatrix_x4(uint32_t* r, const void* shared_row) { emulator::load_matrices("ldmatrix_x4", r, shared_row, 4, false); }
inline void ldmatrix_x4_trans(uint32_t* r, const void* shared_row) {
  emulator::load_matrices("ldmatrix_x4_trans", r, shared_row, 4, true);
}
inline void ldmatrix_x2(uint32_t* r, const void* shared_row) { emulator::load_matrices("ldmatrix_x2", r, shared_row, 2, false); }

inline void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  emulator::mma_16<emulator::bf16_of>("mma_m16n8k16_bf16", d, a, b, c);
}
inline void mma_m16n8k16_fp16(float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  emulator::mma_16<emulator::fp16_of>("mma_m16n8k16_fp16", d, a, b, c);
}
inline void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  emulator::multiply<8>(
      "mma_m16n8k8_tf32", d, a, b, c,
      [](emulator::Fragments** slot, int row, int k) { return emulator::tf32_of(slot[row % 8 * 4 + k % 4]->a[row / 8 + k / 4 * 2]); },
      [](emulator::Fragments** slot, int k, int column) { return emulator::tf32_of(slot[column * 4 + k % 4]->b[k / 4]); });
}
inline uint32_t to_tf32(float x) {  // to the nearest, of equals the one farther from 0
  const uint32_t bits = emulator_bits<uint32_t>(x);
  return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & 0xffffe000;
}

// ---- wgmma: done at the wait, on what shared memory holds then; d is poison in between

enum class Swizzle : uint64_t { none = 0, b128 = 1, b64 = 2, b32 = 3 };

inline uint64_t matrix_descriptor(const void* shared, Swizzle swizzle, int row_block_bytes, int k_block_bytes = 16) {
  emulator::require_aligned(shared, 16, "matrix_descriptor");
  return static_cast<uint64_t>(shared_address(shared) >> 4 & 0x3fff) |
         static_cast<uint64_t>(k_block_bytes >> 4 & 0x3fff) << 16 |
         static_cast<uint64_t>(row_block_bytes >> 4 & 0x3fff) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

inline void wgmma_fence() { emulator::self->is_fenced = true; }

template <int N>
void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool is_added) {
  emulator::wgmma_shared<emulator::bf16_of, N>(d, a, b, is_added);
}
template <int N>
void wgmma_fp16(float (&d)[N / 2], uint64_t a, uint64_t b, bool is_added) {
  emulator::wgmma_shared<emulator::fp16_of, N>(d, a, b, is_added);
}
template <int N>
void wgmma_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool is_added) {
  emulator::wgmma_registers<emulator::bf16_of, N>(d, a, b, is_added);
}
template <int N>
void wgmma_fp16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool is_added) {
  emulator::wgmma_registers<emulator::fp16_of, N>(d, a, b, is_added);
}
inline void wgmma_commit() { emulator::self->wgmmas.emplace_back(); }
template <int N>
void wgmma_wait() {
  emulator::meet_for_wgmma("wgmma_wait");
  emulator::Fiber& self = *emulator::self;
  auto sum_of = [&self](float* d) {
    return std::find_if(self.sums.begin(), self.sums.end(), [d](const auto& sum) { return sum.first == d; });
  };
  std::vector<float*> done;
  while (self.wgmmas.size() > N + 1) {
    for (const emulator::Wgmma& op : self.wgmmas.front()) {
      op.multiply(sum_of(op.d)->second.data());
      done.push_back(op.d);
    }
    self.wgmmas.pop_front();
  }
  for (const auto& group : self.wgmmas)
    for (const emulator::Wgmma& op : group) done.erase(std::remove(done.begin(), done.end(), op.d), done.end());
  for (float* d : done) {
    const auto sum = sum_of(d);
    if (sum == self.sums.end()) continue;  // copied already
    std::copy(sum->second.begin(), sum->second.end(), d);
    self.sums.erase(sum);
  }
  self.is_fenced = false;
}
template <int N>
void wgmma_keep(float (&)[N]) {}
inline void fence_async_shared() {}
template <int N>
void give_up_registers() {}
template <int N>
void ask_for_registers() {}

// ---- mbarrier and bulk copies, which are done when somebody waits for them

using Mbarrier = uint64_t;

inline void mbarrier_init(Mbarrier* barrier, int n_arrivals) {
  const auto n = static_cast<uint16_t>(n_arrivals);
  emulator::state_of(barrier) = {n, n, 0, 0};
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive_expecting(Mbarrier* barrier, int n_bytes) {
  emulator::MbarrierState& state = emulator::state_of(barrier);
  if (state.n_left == 0) return emulator::fail("mbarrier: more arrivals than it was made for");
  state.n_copies = static_cast<int16_t>(state.n_copies + n_bytes / 16);
  --state.n_left;
  emulator::end_phase_if_complete(state);
}
inline void mbarrier_arrive(Mbarrier* barrier) { mbarrier_arrive_expecting(barrier, 0); }
inline void copy_bulk(void* to_shared, const void* from, int n_bytes, Mbarrier* barrier) {
  emulator::require_aligned(to_shared, 16, "copy_bulk");
  emulator::require_aligned(from, 16, "copy_bulk");
  emulator::shared_offset(to_shared);
  if (n_bytes % 16) return emulator::fail("copy_bulk: a multiple of 16 bytes");
  std::memset(to_shared, emulator::poison(), n_bytes);
  emulator::self->block->bulk.push_back({{to_shared, from, n_bytes, n_bytes}, barrier});
}
inline void mbarrier_wait(Mbarrier* barrier, int parity) {
  emulator::MbarrierState& state = emulator::state_of(barrier);
  for (int turn = 0; state.phase == parity; ++turn) {
    auto& bulk = emulator::self->block->bulk;
    for (size_t i = 0; i < bulk.size();) {
      if (bulk[i].second != barrier) {
        ++i;
        continue;
      }
      const emulator::Copy copy = bulk[i].first;
      bulk.erase(bulk.begin() + static_cast<std::ptrdiff_t>(i));
      std::memcpy(copy.to, copy.from, copy.n_bytes);
      state.n_copies = static_cast<int16_t>(state.n_copies - copy.n_bytes / 16);
      emulator::end_phase_if_complete(state);
    }
    if (state.phase != parity) break;
    if (turn > 100000) return emulator::fail("mbarrier_wait waits for ever");
    __nanosleep(0);
  }
}

// ---- clusters

inline unsigned cluster_rank() { return emulator::self->block->rank; }
inline unsigned cluster_size() { return emulator::launched->cluster; }
inline void cluster_sync() {
  emulator::Cluster& cluster = *emulator::self->block->cluster;
  emulator::meet(cluster.meeting, cluster.n_running, "cluster_sync");
}
template <class T>
T* map_shared(T* shared, unsigned rank) {
  const auto& blocks = emulator::self->block->cluster->blocks;
  if (rank >= blocks.size()) {
    emulator::fail("map_shared: no such block in the cluster");
    return nullptr;
  }
  return reinterpret_cast<T*>(blocks[rank]->shared + emulator::shared_offset(shared));
}

}  // namespace clmfast
